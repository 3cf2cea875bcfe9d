"""Which modules of a network read what a module gives, found in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from base.hooks import watching

OTHER = "another function"  # that reads a tensor and is no watched module
# functions whose result holds the same values
VIEWS = {"flatten", "reshape", "view", "unflatten", "transpose", "permute", "contiguous", "dropout"}


def readers_of(
    net: nn.Module, makers: Iterable[str], watched: Iterable[str], arguments: Sequence[torch.Tensor]
) -> dict[str, list[str]]:
    """Maker -> the watched modules that read what it gives, in the order of makers as they ran;
    with OTHER among them where something else does too. `arguments` are those of one sample. A
    maker that runs more than once is left out."""
    trace, makers = _Trace(), set(makers)
    names = {*makers, *watched}
    with (
        watching(net, {name: partial(trace.enter, name) for name in names}, before=True),
        watching(net, {name: partial(trace.leave, name, name in makers) for name in names}),
        trace,
        torch.no_grad(),
    ):
        net(*arguments)
    return {name: readers for name, readers in trace.readers.items() if trace.runs[name] == 1}


class _Trace(TorchFunctionMode):
    """Notes what happens to the results of makers, outside of watched modules."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[torch.Tensor, str]] = {}  # keeps tensors, and so their ids
        self.readers: dict[str, list[str]] = {}
        self.runs: dict[str, int] = {}
        self.depth = 0

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        """A watched module is called."""
        if self.depth == 0:
            self._note(inputs, name)
        self.depth += 1

    def leave(self, name: str, makes: bool, module: nn.Module, inputs: Any, out: Any) -> None:
        """It has answered."""
        self.depth -= 1
        if makes and self.depth == 0:
            self.runs[name] = self.runs.get(name, 0) + 1
            self.readers.setdefault(name, [])
            self.made[id(out)] = out, name

    def _note(self, tensors: Any, reader: str) -> None:
        for leaf in tree_leaves(tensors):
            if id(leaf) in self.made:
                self.readers[self.made[id(leaf)][1]].append(reader)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        out = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if torch.is_tensor(leaf)]
        if self.depth == 0 and results:
            known = [leaf for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.made]
            if known and getattr(function, "__name__", "") in VIEWS:
                self.made[id(results[0])] = results[0], self.made[id(known[0])][1]
            else:
                self._note(known, OTHER)
        return out

"""Inputs and outputs of every reconstruction unit over a calibration set, by streaming from unit to
unit.

A stream holds the activations of one network at the graph cut of the current unit: the outputs of
finished units that something later still reads. To reach the inputs of the next unit the network's
own forward is replayed with finished units answering from the stream, so only the glue between
units (concatenations, padding) is computed again and the whole walk costs one forward pass per
network, O(L) instead of O(L^2). An output that was given up earlier than its last reader
(quant/reconstruction/budget.py) is computed again in the replay that needs it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from base.hooks import watching
from quant.calibration.dataset import CalibrationSet
from quant.graph import Graph
from quant.network import QuantizedNet, modules_of
from quant.reconstruction.store import Rows, Store


class Conditions:
    """The condition of every sample of a calibration set, read like a tensor (N, ...) by rows."""

    def __init__(self, calibration: CalibrationSet):
        self.calibration = calibration

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.calibration.arguments(rows)[2]


class _Reached(Exception):
    """Carries the arguments of the unit that a replay was looking for."""


@contextmanager
def answering(
    modules: Mapping[str, nn.Module], answers: Mapping[str, Callable[..., torch.Tensor]]
) -> Iterator[None]:
    """While inside, modules[name](...) calls answers[name](...) instead of computing."""
    try:
        for name, answer in answers.items():
            modules[name].forward = answer
        yield
    finally:
        for name in answers:
            modules[name].__dict__.pop("forward", None)


class Stream:
    """One network's activations over a calibration set: for each unit in order `inputs`, then
    `advance`, then `free`. `keep` says through which unit (its index) an output is kept; without it
    through the last that reads it."""

    def __init__(
        self,
        net: nn.Module,
        graph: Graph,
        calibration: CalibrationSet,
        *,
        batch_size: int,
        store: Store,
        keep: Mapping[str, int] | None = None,
    ):
        self.net, self.modules, self.graph = net, modules_of(net), graph
        self.calibration, self.store, self.keep = calibration, store, keep or graph.last_use
        self.device, count = next(net.parameters()).device, len(calibration)
        self.rows = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self.outputs, self.shapes = {}, {}

    @torch.no_grad()
    def inputs(self, unit: str) -> list[Any]:
        """Returns the arguments of `unit` over the whole set, each read by rows: an output of an
        earlier unit as it stands is that very one, the condition stays in the calibration set, one
        row for many samples, others are copied. Then lets go of what no later unit needs kept."""
        read, again = self.graph.way_to(unit, self.outputs)
        gathered, copied = [], []
        for rows in self.rows:
            batch = [a.to(self.device) for a in self.calibration.arguments(rows)]
            answered = {name: self.outputs[name][rows].to(self.device) for name in read}
            arguments = self._reach(unit, batch, answered, again)
            if not gathered:
                gathered = [self._source(a, batch, answered) for a in arguments]
                copied = [i for i, source in enumerate(gathered) if source is None]
                for i in copied:
                    gathered[i] = self._whole(arguments[i])
            for i in copied:
                gathered[i][rows] = arguments[i]
        self._drop(self.graph.units.index(unit), gathered)
        return gathered

    def _source(self, a, batch, answered):
        """What already holds an argument over all samples, if anything does."""
        if any(a is c for c in batch[2:]):
            return Conditions(self.calibration)
        return next((self.outputs[name] for name, out in answered.items() if out is a), None)

    def _reach(self, unit, batch, answered, again):
        """What the unit is called with when the network runs on a batch: finished units answer as
        they are told, or run `again`; what the unit does not depend on is zeros without memory."""

        def stop(*arguments):
            raise _Reached(arguments)

        answers = {unit: stop}
        for name, shape in self.shapes.items():
            if name in answered:
                answers[name] = partial(_answer, answered[name])
            elif name in again:
                answers[name] = partial(_run, self.modules[name].forward)
            else:
                nothing = torch.zeros((), device=self.device).expand(len(batch[0]), *shape)
                answers[name] = partial(_answer, nothing)
        try:
            with answering(self.modules, answers):
                self.net(*batch)
        except _Reached as reached:
            return reached.args[0]
        raise RuntimeError(f"the network never calls {unit}")

    def _whole(self, part):
        return self.store.empty((len(self.calibration), *part.shape[1:]))

    @torch.no_grad()
    def advance(self, unit: str, inputs: list[Any]) -> Rows:
        """Runs `unit` on its inputs, keeps the output (N, ...) and returns it."""
        whole = None
        for rows in self.rows:
            if isinstance(self.net, QuantizedNet):
                self.net.timeline.set_time(self.calibration.t[rows].to(self.device))
            out = self.modules[unit](*(a[rows].to(self.device) for a in inputs))
            whole = self._whole(out) if whole is None else whole
            whole[rows] = out
        self.outputs[unit], self.shapes[unit] = whole, whole.shape[1:]
        return whole

    def _drop(self, done, inputs):
        """Lets go of outputs that are kept no further than through unit number `done`; those that
        are its inputs go with these."""
        for name in [n for n in self.outputs if self.keep[n] <= done]:
            output = self.outputs.pop(name)
            if not any(output is a for a in inputs):
                self.store.free(output)

    def free(self, inputs: Iterable[Any]) -> None:
        """Gives back what `inputs` returned, but for outputs that are kept further."""
        for a in inputs:
            if not any(a is output for output in self.outputs.values()):
                self.store.free(a)


def _answer(out, *_):
    return out


def _run(forward, *arguments):
    """Runs a unit as `advance` did: on tensors in the usual order of memory, which sums go by."""
    return forward(*(a.contiguous() for a in arguments)).contiguous()


@torch.no_grad()
def inputs_of(
    net: nn.Module,
    names: Iterable[str],
    calibration: CalibrationSet,
    batch_size: int,
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """Returns the inputs of the modules `names` over a calibration set -> {name: tensor (N, ...)};
    with `whole` a tuple of all their arguments."""
    found, device = {name: [] for name in names}, next(net.parameters()).device

    def note(name, _, inputs):
        found[name].append(inputs)

    with watching(net, {name: partial(note, name) for name in found}, before=True):
        for arguments in calibration.batches(batch_size):
            net(*(a.to(device) for a in arguments))
    joined = {name: tuple(map(torch.cat, zip(*calls))) for name, calls in found.items()}
    return joined if whole else {name: inputs[0] for name, inputs in joined.items()}

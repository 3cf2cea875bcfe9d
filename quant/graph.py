"""The graph of a network, from one forward pass on the meta device, where only shapes are computed:
what runs in which order, what it costs, which reconstruction unit reads the output of which."""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from base.hooks import watching
from base.network import Matmul, Operand
from quant.layers import SWAP


@dataclass
class Graph:
    """macs: layer or attention product -> multiply-adds per image, in execution order. units: names
    in execution order. reads: unit -> the units whose outputs its arguments are computed from.
    arguments: unit -> (values, the unit whose output it is as it stands or None) of each of its
    arguments, the network's condition left out. outputs: unit -> values of its output. operands:
    layer or attention product -> values of what it reads. Values are those of one sample."""

    macs: dict[str, int]
    units: list[str]
    reads: dict[str, list[str]]
    arguments: dict[str, list[tuple[int, str | None]]]
    outputs: dict[str, int]
    operands: dict[str, int] = field(default_factory=dict)

    @cached_property
    def readers(self) -> dict[str, list[int]]:
        """Unit -> indices of the units that read its output, ascending."""
        found = {name: [] for name in self.units}
        for i, unit in enumerate(self.units):
            for read in self.reads[unit]:
                found[read].append(i)
        return found

    @cached_property
    def last_use(self) -> dict[str, int]:
        """Unit -> index of the last unit that reads its output, its own if none does."""
        readers = self.readers
        return {name: max(readers[name], default=i) for i, name in enumerate(self.units)}

    @cached_property
    def work(self) -> dict[str, int]:
        """Unit -> its multiply-adds per image."""
        return self.by_unit(self.macs)

    def by_unit(self, of_layers: Mapping[str, int]) -> dict[str, int]:
        """Adds up for every unit what its layers and products have."""
        units = {unit: 0 for unit in self.units}
        for layer, found in of_layers.items():
            units[next(u for u in units if f"{layer}.".startswith(f"{u}."))] += found
        return units

    def way_to(self, unit: str, kept: Container[str]) -> tuple[set[str], set[str]]:
        """What reaching `unit` takes where only the outputs `kept` are at hand: which of these are
        read, and which other units have to run again, those that it reads, that these read, and so
        on."""
        read, again, open_ends = set(), set(), list(self.reads[unit])
        while open_ends:
            name = open_ends.pop()
            if name in kept:
                read.add(name)
            elif name not in again:
                again.add(name)
                open_ends += self.reads[name]
        return read, again


class _Origins(TorchFunctionMode):
    """Follows every tensor back to the units whose outputs it was computed from."""

    def __init__(self):
        super().__init__()
        self.known = {}  # id -> (the tensor, which keeps its id alive; names of units)
        self.outputs = {}  # id -> the unit whose output it is

    def of(self, tensors):
        return set().union(*(self.known[id(t)][1] for t in tensors if id(t) in self.known))

    def whole(self, tensor):
        return self.outputs.get(id(tensor))

    def begin(self, tensor, name):
        self.known[id(tensor)] = tensor, {name}
        self.outputs[id(tensor)] = name

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        names = self.of(tree_leaves((args, kwargs)))
        for tensor in tree_leaves(out):
            if names and torch.is_tensor(tensor):
                self.known[id(tensor)] = tensor, names
        return out


def trace(net: nn.Module, arguments: Sequence[torch.Tensor]) -> Graph:
    """The Graph of a float network. `arguments` are those of one sample: x (1, C, H, W), t (1,) and
    the condition if the network takes one."""
    arguments = [a.to("meta") for a in arguments]
    layers = [name for name, module in net.named_modules() if type(module) in SWAP]
    macs, operands, reads, read, outputs, origins = {}, {}, {}, {}, {}, _Origins()

    def count(name, module, inputs, out):
        macs[name] = macs.get(name, 0) + out.numel() * _products(module, inputs[0])
        operands[name] = operands.get(name, 0) + sum(a.numel() for a in inputs)

    def note(name, module, inputs, out):
        own = [a for a in inputs if a is not arguments[-1]] if len(arguments) == 3 else inputs
        reads[name] = sorted(origins.of(inputs), key=units.index)
        read[name] = [(a.numel(), origins.whole(a)) for a in own]
        outputs[name] = out.numel()
        origins.begin(out, name)

    _run_on_meta(net, arguments, {name: partial(count, name) for name in layers})
    units = units_in_order(net, macs)
    with origins:
        _run_on_meta(net, arguments, {name: partial(note, name) for name in units})
    return Graph(macs, units, reads, read, outputs, operands)


def _products(module, x):
    """Multiply-adds for one value of what a module gives for x."""
    if isinstance(module, Operand):
        return 0
    return x.shape[-1] if isinstance(module, Matmul) else module.weight[0].numel()


@torch.no_grad()
def _run_on_meta(net, arguments, callbacks):
    """Call `net` with stand-ins for its weights, its modules watched by `callbacks`."""
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    ghosts = {name: tensor.to("meta") for name, tensor in tensors.items()}
    with watching(net, callbacks):
        torch.func.functional_call(net, ghosts, tuple(arguments))


def units_in_order(net: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the reconstruction units in execution order: of each executed layer the enclosing
    block that says `is_unit = True`, or the layer itself."""
    blocks = [name for name, m in net.named_modules() if getattr(m, "is_unit", False)]
    units = []
    for layer in layers:
        unit = next((b for b in blocks if layer.startswith(b + ".")), layer)
        if unit not in units:
            units.append(unit)
    return units

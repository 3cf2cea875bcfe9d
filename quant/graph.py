"""The graph of a network, from one forward pass on the meta device, where only shapes are computed:
what runs in which order, what it costs, which reconstruction unit reads the output of which."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

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
    in execution order. last_use: unit -> index of the last unit that reads its output, its own if
    none does. sizes: unit -> (values of its inputs, the network's condition left out; values of its
    output) for one sample."""

    macs: dict[str, int]
    units: list[str]
    last_use: dict[str, int]
    sizes: dict[str, tuple[int, int]]


class _Origins(TorchFunctionMode):
    """Follows every tensor back to the units whose outputs it was computed from."""

    def __init__(self):
        super().__init__()
        self.known = {}  # id -> (the tensor, which keeps its id alive; names of units)

    def of(self, tensors):
        return set().union(*(self.known[id(t)][1] for t in tensors if id(t) in self.known))

    def set(self, tensor, names):
        self.known[id(tensor)] = tensor, names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        names = self.of(tree_leaves((args, kwargs)))
        for tensor in tree_leaves(out):
            if names and torch.is_tensor(tensor):
                self.set(tensor, names)
        return out


def trace(net: nn.Module, arguments: Sequence[torch.Tensor]) -> Graph:
    """The Graph of a float network. `arguments` are those of one sample: x (1, C, H, W), t (1,) and
    the condition if the network takes one."""
    arguments = [a.to("meta") for a in arguments]
    layers = [name for name, module in net.named_modules() if type(module) in SWAP]
    macs, sizes, readers, origins = {}, {}, {}, _Origins()

    def count(name, module, inputs, out):
        macs[name] = macs.get(name, 0) + out.numel() * _products(module, inputs[0])

    def note(name, module, inputs, out):
        for read in origins.of(inputs):
            readers.setdefault(read, []).append(units.index(name))
        own = [a for a in inputs if a is not arguments[-1]] if len(arguments) == 3 else inputs
        sizes[name] = sum(a.numel() for a in own), out.numel()
        origins.set(out, {name})

    _run_on_meta(net, arguments, {name: partial(count, name) for name in layers})
    units = units_in_order(net, macs)
    with origins:
        _run_on_meta(net, arguments, {name: partial(note, name) for name in units})
    last_use = {name: max(readers.get(name, [i])) for i, name in enumerate(units)}
    return Graph(macs, units, last_use, sizes)


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


def captured_bytes(graph: Graph, num_samples: int) -> int:
    """Memory that reconstruction wants at its worst unit for `num_samples` calibration samples:
    inputs, output and what later units read, in float32, of the float and the quantized network."""
    alive, peak = {}, 0
    for i, unit in enumerate(graph.units):
        inputs, alive[unit] = graph.sizes[unit]
        peak = max(peak, inputs + sum(alive.values()))
        alive = {name: size for name, size in alive.items() if graph.last_use[name] > i}
    return 2 * 4 * num_samples * peak


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

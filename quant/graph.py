"""The graph of a network, from one forward pass on the meta device, where shapes are computed and
nothing else: what runs in which order, what it costs, and which reconstruction unit reads the
output of which."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from base.network import Matmul, Operand
from quant.layers import SWAP


@dataclass
class Graph:
    """macs: layer or attention product -> multiply-adds per image, in execution order. units: names
    in execution order. last_use: unit -> index of the last unit that reads its output, its own if
    none does. sizes: unit -> (values of its inputs, the network's condition left out; values of its
    output) for one sample."""

    macs: dict
    units: list
    last_use: dict
    sizes: dict


class Origins(TorchFunctionMode):
    """Follows every tensor back to the units whose outputs it was computed from."""

    def __init__(self):
        super().__init__()
        # id -> (the tensor, which keeps its id alive; names of units)
        self.known = {}

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


def trace(net, arguments):
    """The Graph of a float network. `arguments` are those of one sample: x (1, C, H, W), t (1,) and
    the condition if the network takes one."""
    macs, modules = {}, dict(net.named_modules())
    arguments = [a.to("meta") for a in arguments]

    def count(name):
        def hook(module, inputs, out):
            macs[name] = macs.get(name, 0) + out.numel() * products(module, inputs[0])

        return hook

    run_on_meta(
        net, arguments, {name: count(name) for name, m in modules.items() if type(m) in SWAP}
    )

    units, sizes, readers, origins = units_in_order(net, macs), {}, {}, Origins()

    def note(name):
        def hook(module, inputs, out):
            for read in origins.of(inputs):
                readers.setdefault(read, []).append(units.index(name))
            own = [a for a in inputs if a is not arguments[-1]] if len(arguments) == 3 else inputs
            sizes[name] = sum(a.numel() for a in own), out.numel()
            origins.set(out, {name})

        return hook

    with origins:
        run_on_meta(net, arguments, {name: note(name) for name in units})
    return Graph(
        macs, units, {name: max(readers.get(name, [i])) for i, name in enumerate(units)}, sizes
    )


def products(module, x):
    """Multiply-adds for one value of what a module gives for x."""
    if isinstance(module, Operand):
        return 0
    return x.shape[-1] if isinstance(module, Matmul) else module.weight[0].numel()


@torch.no_grad()
def run_on_meta(net, arguments, hooks):
    """Call `net` with stand-ins for its weights; hooks {module name: function(module, inputs,
    output)}."""
    ghosts = {
        name: tensor.to("meta")
        for named in (net.named_parameters(), net.named_buffers())
        for name, tensor in named
    }
    with ExitStack() as stack:
        for name, hook in hooks.items():
            stack.callback(net.get_submodule(name).register_forward_hook(hook).remove)
        torch.func.functional_call(net, ghosts, tuple(arguments))


def captured_bytes(graph, num_samples):
    """Memory that reconstruction wants at its worst unit for `num_samples` calibration samples:
    inputs, output and what later units read, in float32, of the full-precision and of the quantized
    network."""
    alive, peak = {}, 0
    for i, unit in enumerate(graph.units):
        inputs, alive[unit] = graph.sizes[unit]
        peak = max(peak, inputs + sum(alive.values()))
        alive = {name: size for name, size in alive.items() if graph.last_use[name] > i}
    return 2 * 4 * num_samples * peak


def units_in_order(net, layers):
    """Names of the reconstruction units in execution order: of each executed layer the enclosing
    block that says `is_unit = True`, or the layer itself."""
    blocks, units = [name for name, m in net.named_modules() if getattr(m, "is_unit", False)], []
    for layer in layers:
        unit = next((b for b in blocks if layer.startswith(b + ".")), layer)
        if unit not in units:
            units.append(unit)
    return units

"""From a hardened quantized network to one that computes on integers and gives the same bits:
modules are replaced, the network's own code stays.

A norm or a rearrangement whose readers are integer layers of one grid hands on codes in place of
floats. What cannot run in integers stays as it is defined and is named in `IntegerNet.reasons`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from base.network import NormAct, Rearrangement, Softmax
from quant.integer.attention import IntegerMatmul, IntegerSoftmax
from quant.integer.cuda_graph import GraphedCall
from quant.integer.grids import Grid, why_no_grid
from quant.integer.layers import IntegerLayer, IntegerNorm, IntegerRearrangement, why_not_integer
from quant.integer.readers import readers_of
from quant.integer.support import why_as_defined
from quant.layers import QuantLayer, QuantMatmul
from quant.network import QuantizedNet, core_of, in_channels_last


class IntegerNet(QuantizedNet):
    """A QuantizedNet on integers. `reasons` {name: why this layer or product stays as it is
    defined}, `integer_layers` the names of those that do not; `engine` and `glue` compute."""

    def __init__(self, net: QuantizedNet, core: nn.Module, reasons: dict[str, str]):
        super().__init__(core, net.timeline)
        self.bypass, self.correction, self.recipe = net.bypass, net.correction, net.recipe
        self.reasons = reasons
        # launching kernels one by one takes a GPU longer than small batches compute
        on_gpu = next(core.parameters()).is_cuda
        self.graphed = GraphedCall(self.answer) if on_gpu else None

    @property
    def integer_layers(self) -> list[str]:
        """Names of the layers that compute on integers."""
        return [name for name, m in self.net.named_modules() if isinstance(m, IntegerLayer)]

    def forward(self, x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        """The answer to x (N, C, H, W) at the network times t (N,), under a condition if any;
        samples of several time segments run apart."""
        self.timeline.set_time(t)
        if not torch.is_tensor(self.timeline.segment):
            return self._run(x, t, *cond)
        segments, out = self.timeline.segment, None
        for segment in segments.unique():
            rows = segments == segment
            self.timeline.set_time(t[rows])
            part = self._run(x[rows], t[rows], *(c[rows] for c in cond))
            out = x.new_empty(len(x), *part.shape[1:]) if out is None else out
            out[rows] = part
        return out

    def _run(self, *given):
        if self.graphed is None:
            return self.answer(*given)
        return self.graphed(*given, state=self.timeline.segment)


def lower(
    net: QuantizedNet, arguments: Sequence[torch.Tensor], engine: Any, glue: Any
) -> IntegerNet:
    """An IntegerNet that shares what it can with `net`, which stays as it is and must be hardened.
    `arguments` are those of one sample: x (1, C, H, W), t (1,) and the condition if there is one.
    `engine` makes integer products (quant/integer/cpu.py), `glue` is quant.integer.glue or a
    compiled form of it."""
    core = core_of(net)
    net.timeline.set_time(arguments[1])
    modules = dict(core.named_modules())
    layers = {name: m for name, m in modules.items() if isinstance(m, QuantLayer)}
    reasons = {name: why_not_integer(layer, engine.largest) for name, layer in layers.items()}
    new = {
        name: IntegerLayer(layer, engine, glue)
        for name, layer in layers.items()
        if not reasons[name]
    }
    new |= _matmuls(modules, engine, glue)
    new |= _glue_modules(core, modules, new, arguments, glue)
    reasons |= {
        name: why_as_defined(m) for name, m in modules.items() if isinstance(m, QuantMatmul)
    }
    copied = in_channels_last(core, {id(modules[name]): module for name, module in new.items()})
    return IntegerNet(net, copied, {name: why for name, why in reasons.items() if why}).eval()


def _matmuls(modules, engine, glue):
    """Products whose operands both have codes with one scale."""
    found = {}
    for name, m in modules.items():
        if isinstance(m, QuantMatmul):
            if not any(why_no_grid(q, 16) for q in (m.a_quantizer, m.b_quantizer)):
                found[name] = IntegerMatmul(m, engine, glue)
    return found


def _glue_modules(core, modules, layers, arguments, glue):
    """Norms and rearrangements that hand on codes, and norms that one pass computes."""
    kinds = (NormAct, Rearrangement, Softmax, QuantMatmul)
    makers = [name for name, m in modules.items() if isinstance(m, kinds)]
    readers = readers_of(core, makers, [*layers, *makers], arguments)
    grids: dict[str, Grid] = {
        name: layer.grids[0]
        for name, layer in layers.items()
        if isinstance(layer, IntegerLayer) and len(layer.grids) == 1
    }
    new = {}
    for name in reversed(readers):  # what reads has its grid before what it reads
        wanted = [grids.get(reader) for reader in readers[name]]
        alike = wanted and all(grid and grid.equals(wanted[0]) for grid in wanted)
        grid = wanted[0] if alike else None
        if isinstance(modules[name], Softmax):
            new |= _softmax(name, readers, layers, glue)
        elif isinstance(modules[name], NormAct):
            new[name] = IntegerNorm(modules[name], grid, glue)
        elif isinstance(modules[name], Rearrangement) and grid:
            new[name] = IntegerRearrangement(modules[name], grid, glue)
            grids[name] = grid
    return new


def _softmax(name, readers, layers, glue):
    """Of a softmax that one product of 8 bits reads, and its scores, what stands in its place."""
    product = layers.get(readers[name][0]) if len(readers[name]) == 1 else None
    if not isinstance(product, IntegerMatmul):
        return {}
    grid = product.grids[product.roles.index("probs")]
    if not grid.has_codes:
        return {}
    maker = next((layers.get(m) for m, read in readers.items() if read == [name]), None)
    scores = maker if isinstance(maker, IntegerMatmul) else None
    if scores is not None:
        scores.scaled = False
    return {name: IntegerSoftmax(grid, scores, glue)}

"""The simulated forward of published code (Q-Diffusion, EDA-DM and what they build on): every layer
quantizes its float weight anew in every call, and its input by elementwise passes over the whole
tensor. Those are six here, the fewest in which it can be written so; the straight-through rounding
of that code adds two."""

import copy

import torch
from torch import nn

from quant.layers import QuantLayer, QuantMatmul, operation
from quant.network import QuantizedNet, modules_of
from quant.quantizer import Quantizer


def published_net(net: nn.Module, quantized: QuantizedNet) -> nn.Module:
    """The float network `net`, whose weights are shared, simulated in that way with the scales of
    its hardened form, which has one time segment."""
    copied = copy.deepcopy(net, {id(p): p for p in net.parameters()})
    for name, module in modules_of(quantized).items():
        if isinstance(module, QuantLayer):
            copied.set_submodule(name, PublishedLayer(copied.get_submodule(name), module))
        elif isinstance(module, QuantMatmul):
            copied.set_submodule(name, PublishedMatmul(module))
    return copied


def on_grid(x: torch.Tensor, q: Quantizer | None, part: int = 0, parts: int = 1) -> torch.Tensor:
    """x, or one of several concatenated parts of it, on the grid of a quantizer."""
    if q is None:
        return x
    scale, zero = (table[0].chunk(parts)[part] for table in (q.scale, q.zero_point))
    if len(scale) > 1:  # one for every output channel of a weight
        scale, zero = (values.reshape(-1, *[1] * (x.dim() - 1)) for values in (scale, zero))
    codes = torch.clamp(torch.round(x / scale) + zero, q.low, q.high)
    return (codes - zero) * scale


class PublishedLayer(nn.Module):
    """A layer that quantizes its weight and its input in every call."""

    def __init__(self, layer: nn.Module, quantized: QuantLayer):
        super().__init__()
        self.weight, self.bias, self.operation = layer.weight, layer.bias, operation(layer)
        self.quantized = [quantized]  # in a list: no module of this one
        self.parts = quantized.parts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's answer to x (N, in, ...), or (N, ..., in) of a Linear."""
        q, count = self.quantized[0], len(self.parts)
        pieces = [x] if count == 1 else x.split(self.parts, dim=1)
        x = [on_grid(piece, q.input_quantizer, i, count) for i, piece in enumerate(pieces)]
        columns = self.weight.split(self.parts, dim=1)
        weight = [on_grid(part, q.weight_quantizer, i, count) for i, part in enumerate(columns)]
        if count > 1:
            return self.operation(torch.cat(x, dim=1), torch.cat(weight, dim=1), self.bias)
        return self.operation(x[0], weight[0], self.bias)


class PublishedMatmul(nn.Module):
    """A product of activations that quantizes both."""

    def __init__(self, quantized: QuantMatmul):
        super().__init__()
        self.a_quantizer, self.b_quantizer = quantized.a_quantizer, quantized.b_quantizer

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (N, [heads,] rows, inner) @ b (N, [heads,] inner, columns)."""
        return on_grid(a, self.a_quantizer) @ on_grid(b, self.b_quantizer)

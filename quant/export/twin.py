"""A hardened network as one that traces to ONNX: every quantized layer, product and operand is
replaced by a module made of what quant/export/grids.py offers.

Weights become int8. Where the integers of an 8-bit weight leave int8 (asymmetric ones, code minus
zero point, lie between -255 and 255), they are c + o with c in int8 and one number o for each
output: conv(q, c + o) = conv(q, c) + o * conv(q, 1), and the last factor is one channel for all."""

import copy
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from quant.export.grids import (
    BY_TIME,
    Clock,
    FloatGrid,
    LinearGrid,
    SteppedCodes,
    dequantize_linear,
    obstacle,
)
from quant.layers import QuantLayer, QuantMatmul, QuantOperand
from quant.network import QuantizedNet, quant_layers, stem_of
from quant.quantizer import Quantizer

Multiply = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of x and a weight


class Weight(nn.Module):
    """One part of a hardened weight: int8 integers (out, in, ...), of a Linear (in, out), and the
    scale of each output."""

    def __init__(self, layer: QuantLayer, part: int):
        super().__init__()
        integers = layer.weight_int.split(layer.parts, dim=1)[part]
        flat, scale = integers.flatten(1), layer.weight_scales().chunk(len(layer.parts))[part]
        shift = (flat.amin(1) + 128).clamp(max=0) + (flat.amax(1) - 127).clamp(min=0)
        integers = integers - shift.reshape(-1, *[1] * (integers.dim() - 1))
        ones = torch.ones_like(integers[:1])
        if not layer.trailing:  # so that nothing stands between the product x @ w and its integers
            integers, ones = integers.T, ones.T
        self.axis, self.per_channel = (0 if layer.trailing else 1), layer.per_channel
        self.register_buffer("integers", integers.to(torch.int8).contiguous())
        self.register_buffer("scale", scale.detach().expand(len(flat)).clone())
        self.register_buffer("one", torch.ones(len(flat)))
        self.sums = flat.sum(1)  # of each output
        self.register_buffer("shift", shift if shift.any() else None)
        self.register_buffer("ones", ones.to(torch.int8).contiguous())

    def forward(self, x: torch.Tensor, scale: torch.Tensor, product: Multiply) -> torch.Tensor:
        """`product` of x and the integers, times `scale` (out,)."""
        out = product(x, dequantize_linear(self.integers, scale, axis=self.axis))
        if self.shift is None:
            return out
        total = product(x, dequantize_linear(self.ones, self.one[:1], axis=self.axis))
        return out + self.per_channel(self.shift * scale) * total


class FloatWeight(nn.Module):
    """A weight that is not quantized."""

    def __init__(self, layer: QuantLayer, part: int):
        super().__init__()
        weight = layer.weight.detach().split(layer.parts, dim=1)[part]
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("weight", weight if layer.trailing else weight.T.contiguous())

    def forward(self, x: torch.Tensor, scale: torch.Tensor, product: Multiply) -> torch.Tensor:
        """`product` of x and the weight."""
        return product(x, self.weight)


class Layer(nn.Module):
    """A quantized layer: the product of each part, scaled, and their sum, the bias with the
    first."""

    def __init__(self, layer: QuantLayer, clock: Clock):
        super().__init__()
        self.parts, self.per_channel = layer.parts, layer.per_channel
        self.product = layer.operation if layer.trailing else torch.matmul
        kind = FloatWeight if layer.weight_int is None else Weight
        self.weights = nn.ModuleList(kind(layer, part) for part in range(len(self.parts)))
        self.grids, self.before = None, nn.Identity()
        q = layer.input_quantizer
        if q is not None and obstacle(q):
            self.before = FloatGrid(q, clock)
        elif q is not None:
            self.grids = nn.ModuleList(LinearGrid(q, part) for part in range(len(self.parts)))
        for name in ("bias", "inverse_balance"):
            value = getattr(layer, name)
            value = None if value is None else layer.per_channel(value.detach())
            self.register_buffer(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's answer to x (N, in, ...), or (N, ..., in) of a Linear."""
        x = x.float() if self.inverse_balance is None else x.float() * self.inverse_balance
        x = self.before(x)
        out = None
        pieces = x.split(self.parts, dim=1) if len(self.parts) > 1 else [x]
        for part, piece in enumerate(pieces):
            term = self.term(part, piece)
            if part == 0:
                out = term if self.bias is None else term + self.bias
            else:
                out = out + term
        return out

    def term(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """What a part of the input adds."""
        weight = self.weights[part]
        x = x if self.grids is None else self.grids[part](x)
        return weight(x, weight.scale, self.product)


class SteppedLayer(Layer):
    """A layer whose input has other scales at other times. The product is one of codes; tables of
    `factors` and `offsets` (segments, out, ...) for each part make the answer of it: both scales,
    and minus the zero point times the sum of an output's weights, with the bias."""

    def __init__(self, layer: QuantLayer, clock: Clock):
        super().__init__(layer, clock)
        self.clock, self.before, self.padding = clock, nn.Identity(), []
        if layer.trailing:  # with codes of zero, before their zero point is subtracted
            sizes = layer.operation.keywords["padding"]
            self.padding = [size for size in reversed(sizes) for _ in range(2)]
            self.product = partial(layer.operation, bias=None, padding=0)
        q = layer.input_quantizer
        self.grids = nn.ModuleList(SteppedCodes(q, clock, i) for i in range(len(self.parts)))
        for i, (grid, weight) in enumerate(zip(self.grids, self.weights)):
            factors = grid.scale.double()[:, None] * weight.scale
            offsets = -grid.zero_points[:, None] * weight.sums * factors
            if i == 0 and layer.bias is not None:
                offsets = offsets + layer.bias.detach()
            for name, table in (("factors", factors), ("offsets", offsets)):
                table = table.float().reshape(*table.shape, *[1] * layer.trailing)
                self.register_buffer(f"{name}_{i}", table)
        self.bias = None

    def term(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """What a part of the input adds."""
        weight = self.weights[part]
        sums = weight(self.grids[part](x, self.padding), weight.one, self.product)
        factors, offsets = (
            self.clock.rows(getattr(self, f"{name}_{part}"), sums.dim())
            for name in ("factors", "offsets")
        )
        return sums * factors + offsets


class Product(nn.Module):
    """A product of two activations, each on its grid."""

    def __init__(self, matmul: QuantMatmul, clock: Clock):
        super().__init__()
        self.a, self.b = (grid_of(q, clock) for q in (matmul.a_quantizer, matmul.b_quantizer))

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (N, [heads,] rows, inner) @ b (N, [heads,] inner, columns)."""
        return self.a(a) @ self.b(b)


class Portable(nn.Module):
    """A quantized network with its bypass, called as it is; `floating` says what of it computes in
    floating point: reason -> names. The correction of a network belongs to its sampler."""

    def __init__(self, net: QuantizedNet):
        super().__init__()
        check(net)
        self.clock, self.floating = Clock(net.timeline), defaultdict(list)
        shared = {id(v): v for v in net.state_dict(keep_vars=True).values()}  # not copied
        self.net = copy.deepcopy(net.net, shared)
        for name, module in list(self.net.named_modules()):
            if isinstance(module, (QuantLayer, QuantMatmul, QuantOperand)):
                self.net.set_submodule(name, self.replaced(name, module))
        self.register_buffer("gain", None if net.bypass is None else net.bypass.gain)
        stem = None if net.bypass is None else stem_of(net)
        self.stem_grid = None if stem is None else grid_of(stem.input_quantizer, self.clock)
        balance = None if stem is None else stem.inverse_balance
        self.register_buffer("balance", None if balance is None else stem.per_channel(balance))

    def replaced(self, name: str, module: nn.Module) -> nn.Module:
        """What stands in the place of a quantized module."""
        if isinstance(module, QuantOperand):
            return FloatGrid(module.input_quantizer, self.clock)
        if isinstance(module, QuantMatmul):
            reasons = {obstacle(q) for q in (module.a_quantizer, module.b_quantizer) if q}
            found = Product(module, self.clock)
        else:
            q = module.input_quantizer
            reasons = {obstacle(q)} if q is not None else set()
            stepped = reasons == {BY_TIME} and module.weight_int is not None
            found = (SteppedLayer if stepped else Layer)(module, self.clock)
            reasons = set() if stepped else reasons
        for reason in sorted(reasons - {""}):
            self.floating[reason].append(name)
        return found

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The answer to x (N, C, H, W) at the network times t (N,), under a condition if any."""
        self.clock.set_time(t)
        answer = self.net(x, t) if cond is None else self.net(x, t, cond)
        if self.gain is None:
            return answer
        balance = 1.0 if self.balance is None else self.balance
        error = x - self.stem_grid(x * balance) / balance
        added = self.clock.rows(self.gain, 3) @ error.flatten(2)
        return answer + added.unflatten(2, error.shape[2:])


def grid_of(quantizer: Quantizer | None, clock: Clock) -> nn.Module:
    """What puts an activation on its grid, uint8 codes where that can be."""
    if quantizer is None:
        return nn.Identity()
    return FloatGrid(quantizer, clock) if obstacle(quantizer) else LinearGrid(quantizer)


def check(net: QuantizedNet) -> None:
    """Raises ValueError for a network that one graph of integers cannot hold."""
    for name, layer in quant_layers(net).items():
        if layer.has_segments:
            raise ValueError(
                f"{name} has own weights for every time segment (per_segment), which one graph "
                "does not hold; export a run of a method without segment_models"
            )
        if layer.weight_quantizer is not None and layer.weight_int is None:
            raise ValueError(
                f"the weight of {name} is not an integer yet; call quant.network.harden(net) first"
            )

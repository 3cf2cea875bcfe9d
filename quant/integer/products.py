"""The integer product of one layer, made of those that an engine has: weights that int8 cannot hold
are shifted, and where an engine is slow with zero points the map is padded and they are taken off
behind the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from quant.layers import QuantLayer

# A zero point costs oneDNN a walk over the weights; to take it off behind costs three calls, as
# much as so many weights, and a pass over the outputs, so many of which cost as much as one weight
# (measured on a Xeon at 2.1 GHz, torch 2.15).
CALLS, OUTPUTS_PER_WEIGHT = 2**16, 3
EXACT = 2**24  # below, float32 holds every integer


def product_of(weight: torch.Tensor, layer: QuantLayer, engine: Any, glue: Any) -> Any:
    """The product with integers (out, in, ...) held in floats, which are all weights of a layer or
    those of one concatenated part: a function of (codes, zero_point, scale, bias)."""
    shifts = shifts_of(weight)
    shifted = weight - shifts.reshape(-1, *[1] * (weight.dim() - 1))
    whole = _make(shifted, layer, engine, glue)
    if not shifts.any():
        return whole
    return Shifted(whole, _make(torch.ones_like(weight[:1]), layer, engine, glue), shifts, glue)


def _make(weight, layer, engine, glue):
    small = weight.to(torch.int8)
    if layer.trailing == 0:
        return engine.linear(small)
    stride, padding, dilation = (
        layer.operation.keywords[key] for key in ("stride", "padding", "dilation")
    )
    if layer.trailing == 1:
        weight, small = weight.unsqueeze(2), small.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    native = engine.conv(small.contiguous(), stride, padding, dilation)
    # sums of unsigned codes, which are larger than those of integers
    largest = 255 * max(weight.clamp(min=0).flatten(1).sum(1).max(), 1)
    largest = max(largest, 255 * -weight.clamp(max=0).flatten(1).sum(1).min())
    if not engine.slow_zero_points or largest >= EXACT:
        return native
    raw = engine.conv(small.contiguous(), stride, (0, 0), dilation)
    return Compensated(native, raw, weight, padding, glue)


def shifts_of(weight: torch.Tensor) -> torch.Tensor:
    """What is taken from the integers (out, ...) of each output channel for the rest to fit int8:
    0 unless an asymmetric grid of 8 bits needs it."""
    low, high = weight.flatten(1).aminmax(dim=1)
    outside = (low < -128) | (high > 127)
    return torch.where(outside, ((low + high) / 2).ceil(), 0.0)


class Shifted:
    """A product with weights that int8 cannot hold: those less a shift for each output channel,
    and shift times the sum of the integers under the kernel."""

    def __init__(self, whole: Any, box: Any, shifts: torch.Tensor, glue: Any):
        self.whole, self.box, self.shifts, self.glue = whole, box, shifts, glue
        self.ones = torch.ones_like(shifts)

    def __call__(
        self, codes: torch.Tensor, zero_point: int, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """As the products of an engine."""
        sums = self.whole(codes, zero_point, self.ones, None)
        boxes = self.box(codes, zero_point, self.ones[:1], None)
        return self.glue.rescale(sums, boxes, self.shifts, scale, bias)


class Compensated:
    """A convolution as sum (q - z) w = sum q w - z sum w, of a map that is padded with z, where the
    weights (O, C, KH, KW) are many beside the outputs; else `native`. `raw` does not pad."""

    def __init__(self, native: Any, raw: Any, weight: torch.Tensor, padding: Any, glue: Any):
        self.native, self.raw, self.glue = native, raw, glue
        self.totals = weight.flatten(1).sum(1)
        self.ones, self.num_weights = torch.ones_like(self.totals), weight.numel()
        self.pads = [side for size in reversed(padding) for side in (size, size)]

    def __call__(
        self, codes: torch.Tensor, zero_point: int, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """As the products of an engine."""
        outputs = codes.numel() // codes.shape[1] * len(self.totals)
        if zero_point == 0 or self.num_weights < CALLS + outputs / OUTPUTS_PER_WEIGHT:
            return self.native(codes, zero_point, scale, bias)
        if any(self.pads):
            codes = F.pad(codes, self.pads, value=zero_point)
        sums = self.raw(codes, 0, self.ones, None)
        points = sums.new_full((len(sums), 1, *sums.shape[2:]), -zero_point)
        return self.glue.rescale(sums, points, self.totals, scale, bias)

"""The modules of an integer network. Each stands in the place of one of the quantized network and
gives the same bits; between them codes travel as uint8: what reads a uint8 tensor takes it for
codes on its own grid, what reads floats quantizes them first."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from base.network import NormAct, Rearrangement
from quant.integer.grids import Grid
from quant.integer.products import product_of, shifts_of
from quant.integer.support import why_as_defined
from quant.layers import QuantLayer


class IntegerLayer(nn.Module):
    """A hardened QuantLayer on integers: for every concatenated part one integer product, for every
    time segment its scales. `engine` makes the products, `glue` quantizes."""

    # what the bypass of the input asks of the first layer
    input_error, per_channel = QuantLayer.input_error, QuantLayer.per_channel

    def __init__(self, layer: QuantLayer, engine: Any, glue: Any):
        super().__init__()
        self.role, self.parts, self.trailing = layer.role, layer.parts, layer.trailing
        self.bias, self.input_quantizer = layer.bias, layer.input_quantizer
        self.inverse_balance, self.glue = layer.inverse_balance, glue
        self.is_1d = layer.trailing == 1  # engines compute it as a map of height 1
        balances = [None] * len(self.parts)
        if layer.inverse_balance is not None:
            factors = layer.inverse_balance.split(self.parts)
            axes = [1] * min(2 * layer.trailing, 2)  # behind the channels of a map
            balances = [own.reshape(-1, *axes) for own in factors]
        q = layer.input_quantizer
        self.grids = [Grid(q, part, balance) for part, balance in enumerate(balances)]
        weights = layer.weight_int if layer.has_segments else layer.weight_int[None]
        self.products = [
            [product_of(part, layer, engine, glue) for part in weight.split(self.parts, dim=1)]
            for weight in weights
        ]
        self.weight_timeline = layer.weight_quantizer.timeline if layer.has_segments else None
        self.scales = list(_scales(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's answer, float32, to x (N, in, ...), or (N, ..., in) of a Linear, or to its
        codes. Maps are channels_last."""
        segment = self.grids[0].segment
        own = self.weight_timeline.segment if self.weight_timeline else 0
        timed = max(segment, own)  # one of them is the segment wherever there are several
        x = x.unsqueeze(2) if self.is_1d else x
        inputs = x.split(self.parts, dim=1) if len(self.parts) > 1 else [x]
        out = None
        for part, (values, grid) in enumerate(zip(inputs, self.grids)):
            codes = values if values.dtype is torch.uint8 else self.glue.quantize(values, grid.row)
            bias, scale = (self.bias if part == 0 else None), self.scales[timed][part]
            product = self.products[own][part]
            term = product(codes, grid.row.zero_point, scale, bias)
            out = term if out is None else out.add_(term)
        return out.squeeze(2) if self.is_1d else out


def _scales(layer):
    """For every time segment the s_x * s_w (out,) of each part."""
    weights, inputs = layer.weight_quantizer.scale, layer.input_quantizer.scale
    for segment in range(max(len(weights), len(inputs))):
        w = weights[segment % len(weights)].chunk(len(layer.parts))
        x = inputs[segment % len(inputs)]
        yield [(x[part] * own).expand(layer.shape[0]).contiguous() for part, own in enumerate(w)]


def why_not_integer(layer: QuantLayer, largest: int) -> str:
    """Why a hardened layer cannot run on an engine whose weights are at most `largest`; "" if it
    can."""
    reason = why_as_defined(layer)
    if reason:
        return reason
    shifts = shifts_of(layer.weight_int.reshape(-1, *layer.shape[1:]))
    fitting = layer.weight_int.abs().max() if not shifts.any() else 128
    if fitting > largest:
        bits = layer.weight_quantizer.spec.bits
        return f"its weights of {bits} bits overflow on this processor, which has no VNNI"
    return ""


class IntegerNorm(nn.Module):
    """A NormAct whose readers take codes: of one grid, or floats where `grid` is None."""

    def __init__(self, norm: NormAct, grid: Grid | None, glue: Any):
        super().__init__()
        self.norm, self.grid, self.glue = norm, grid, glue
        self.weight, self.bias = norm.weight, norm.bias  # networks ask for their dtype

    def forward(self, x: torch.Tensor, added: Any = None, scale_shift: Any = None) -> torch.Tensor:
        """Codes of what the norm gives, uint8, or that itself; arguments are the norm's."""
        if self.grid is None:
            return self.glue.norm_act(x, self.norm, added, scale_shift)
        return self.glue.norm_act_quantize(x, self.norm, self.grid.row, added, scale_shift)


class IntegerRearrangement(nn.Module):
    """A Rearrangement of codes; floats are quantized in front of it, where there are fewer."""

    def __init__(self, inner: Rearrangement, grid: Grid, glue: Any):
        super().__init__()
        self.inner, self.grid, self.glue = inner, grid, glue

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rearranged codes, uint8, of x or of its codes."""
        row = self.grid.row
        codes = x if x.dtype is torch.uint8 else self.glue.quantize(x, row)
        return self.inner(codes, row.zero_point)

"""Activation quantizers as ONNX says them: QuantizeLinear and DequantizeLinear on uint8 codes where
one scale holds for the whole tensor at all times, else the definition in float32.

What runs faster in integers follows from that: a runtime makes an integer product of a convolution
whose operands both come out of a DequantizeLinear with constant scales."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from quant.grid import code_range, log2_codes
from quant.quantizer import Quantizer
from quant.timeline import Timeline

LARGEST = 255  # code that uint8 holds
BY_TIME = "scales that differ by time"
OPSET = 21  # of ONNX: the first with tensors of 4 bits


def quantize_linear(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """ONNX's QuantizeLinear: saturate(round(x / scale) + zero_point) in the type of the latter."""
    inputs = x, scale, zero_point
    return torch.onnx.ops.symbolic(
        "QuantizeLinear", inputs, dtype=zero_point.dtype, shape=x.shape, version=OPSET
    )


def dequantize_linear(
    codes: torch.Tensor, scale: torch.Tensor, *zero_point: torch.Tensor, axis: int | None = None
) -> torch.Tensor:
    """ONNX's DequantizeLinear: (codes - zero_point) * scale, both per tensor or along `axis`."""
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (codes, scale, *zero_point),
        {} if axis is None else {"axis": axis},
        dtype=torch.float32,
        shape=codes.shape,
        version=OPSET,
    )


class Clock:
    """Which time segment each sample of the batch lies in: (N,), set by the network as it is
    called, read by the tables."""

    def __init__(self, timeline: Timeline):
        self.boundaries, self.segment = timeline.boundaries, torch.zeros(1, dtype=torch.long)

    def set_time(self, t: torch.Tensor) -> None:
        """Tell it the network times t (N,)."""
        # boundaries b with b <= t; bucketize has no form in ONNX
        self.segment = (self.boundaries <= t.float()[:, None]).sum(1)

    def rows(self, table: torch.Tensor, dim: int) -> torch.Tensor:
        """Of a table (segments, *entry) the rows of the samples, (N, 1, ..., *entry) with `dim`
        axes; of a table of one row that one (1, 1, ..., *entry)."""
        rows = table if len(table) == 1 else table.index_select(0, self.segment)
        return rows.reshape(-1, *[1] * (dim - table.dim()), *table.shape[1:])


def ends_of(quantizer: Quantizer) -> torch.Tensor:
    """The smallest and the largest code in each time segment, (2, segments)."""
    ends = [code_range(bits, quantizer.spec.symmetric) for bits in quantizer.bits]
    return torch.tensor(ends, dtype=torch.float32).T


def obstacle(quantizer: Quantizer) -> str:
    """Why no QuantizeLinear with constant scales holds this quantizer; "" if one does."""
    spec = quantizer.spec
    if spec.grid != "uniform":
        return f"the grid {spec.grid}"
    if max(quantizer.bits) > 8:
        return "more than 8 bits"
    if spec.per != "tensor":
        return f"scales per {spec.per}"
    return BY_TIME if len(quantizer.scale) > 1 else ""


class LinearGrid(nn.Module):
    """x on the grid of one scale and zero point, through uint8 codes."""

    def __init__(self, quantizer: Quantizer, part: int = 0):
        super().__init__()
        low, high = ends_of(quantizer)[:, 0]
        scale, zero_point = quantizer.scale[0, part], quantizer.zero_point[0, part] - low
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.to(torch.uint8))
        # codes of fewer bits lie in uint8 as they are: values beyond the end codes are cut before
        ends = (torch.stack([low - low, high - low]) - zero_point) * scale
        self.ends = None if high - low == LARGEST else ends.tolist()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (...) -> (code - zero_point) * scale."""
        x = x if self.ends is None else x.clamp(*self.ends)
        codes = quantize_linear(x, self.scale, self.zero_point)
        return dequantize_linear(codes, self.scale, self.zero_point)


class FloatGrid(nn.Module):
    """x on any grid as quant/quantizer.py defines it, in float32: per channel or head, with tables
    by time, in powers of two."""

    def __init__(self, quantizer: Quantizer, clock: Clock):
        super().__init__()
        self.clock, self.spec = clock, quantizer.spec
        groups = quantizer.group_of
        self.register_buffer("scale", quantizer.scale.detach()[:, groups])
        zero_point = quantizer.zero_point[:, groups]
        low, high = (
            end.reshape(-1, *[1] * groups.dim()) - zero_point for end in ends_of(quantizer)
        )
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, ...) -> (code - zero_point) * scale."""
        scale = self.clock.rows(self.scale, x.dim())
        if self.spec.grid == "log2":
            return log2_codes(x, self.spec.bits) * scale
        low, high = (self.clock.rows(end, x.dim()) for end in (self.low, self.high))
        codes = (x * scale.reciprocal()).round()
        return torch.minimum(torch.maximum(codes, low), high) * scale


class SteppedCodes(nn.Module):
    """Codes of x by tables over time, in a form whose scale and zero point are constants: x times
    1/scale, rounded, plus the zero point goes through a QuantizeLinear of scale 1. The layer undoes
    both behind its product."""

    def __init__(self, quantizer: Quantizer, clock: Clock, part: int = 0):
        super().__init__()
        self.clock = clock
        low, high = ends_of(quantizer)
        self.scale = quantizer.scale[:, part].detach()
        self.register_buffer("inverse", self.scale.reciprocal())
        self.register_buffer("zero_points", quantizer.zero_point[:, part] - low)
        self.register_buffer("largest", None if all(high - low == LARGEST) else high - low)
        self.register_buffer("one", torch.ones(()))
        self.register_buffer("zero", torch.zeros((), dtype=torch.uint8))

    def forward(self, x: torch.Tensor, padding: Sequence[int]) -> torch.Tensor:
        """x (N, ...), padded with zeros, as unsigned codes in float32, zero point not subtracted;
        `padding` as F.pad takes it."""
        x = F.pad(x, padding) if any(padding) else x
        inverse, zero_point = (
            self.clock.rows(table, x.dim()) for table in (self.inverse, self.zero_points)
        )
        codes = (x * inverse).round() + zero_point
        if self.largest is not None:
            codes = torch.minimum(codes, self.clock.rows(self.largest, x.dim()))
        return dequantize_linear(quantize_linear(codes, self.one, self.zero), self.one, self.zero)

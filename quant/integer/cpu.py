"""Integer products on the CPU, by the operators of PyTorch that call oneDNN: codes uint8, weights
int8, sums int32.

With the scale of x = 1 and the product s_x * s_w as that of the weights every processor computes
sum * (s_x * s_w) + b, which is how a layer is defined (quant/layers.py); with both scales apart the
order of the products is the processor's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Product = Callable[[torch.Tensor, int, torch.Tensor, torch.Tensor | None], torch.Tensor]
Sizes = Sequence[int]
SAFE = 64  # 2 products of a code below 256 with such a weight fit 16 bits, whatever the processor
OPERATORS = ("qconv_prepack", "qconv_pointwise", "qlinear_prepack", "qlinear_pointwise")


@dataclass(frozen=True)
class OnednnEngine:
    """Makes products of integer weights: functions of (codes, zero_point, scale (O,), bias (O,) or
    None) -> (sum of (code - zero point) * weight) * scale + bias, float32, in which padding is the
    zero point. `largest` is the largest |weight| that is computed exactly."""

    largest: int = 128
    slow_zero_points = True  # it walks over the weights for one, in every call

    def conv(self, weight: torch.Tensor, stride: Sizes, padding: Sizes, dilation: Sizes) -> Product:
        """A convolution with weight (O, C, KH, KW) int8 of codes (N, C, H, W), channels_last."""
        ones, zeros = torch.ones(len(weight)), torch.zeros(len(weight), dtype=torch.int32)
        how = list(stride), list(padding), list(dilation), 1
        packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *how, None)

        def product(codes, zero_point, scale, bias):
            codes = codes.contiguous(memory_format=torch.channels_last)
            given = codes, 1.0, zero_point, packed, scale, zeros, bias
            plain = 1.0, 0, torch.float32, "none", [], ""
            return torch.ops.onednn.qconv_pointwise(*given, *how, *plain)

        return product

    def linear(self, weight: torch.Tensor) -> Product:
        """A product of codes (..., C) with weight (O, C) int8."""
        zeros = torch.zeros(len(weight), dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(weight, None)

        def product(codes, zero_point, scale, bias):
            given = codes.contiguous(), 1.0, zero_point, packed, scale, zeros, bias
            return torch.ops.onednn.qlinear_pointwise(*given, 1.0, 0, torch.float32, "none", [], "")

        return product

    def matmul(
        self,
        codes: torch.Tensor,
        zero_point: int,
        weights: torch.Tensor,
        weight_zero_point: int,
        scale: float,
    ) -> torch.Tensor:
        """A product of codes (..., R, I) with those of weights (..., O, I), both uint8 with a zero
        point -> (..., R, O), times scale; one after the other of what stands in front. A row of
        ones below the weights gives the sums that their zero point is multiplied with. As a 1x1
        convolution, whose weights oneDNN lays out several times faster than a linear layer's."""
        front, (rows, inner), outputs = codes.shape[:-2], codes.shape[-2:], weights.shape[-2]
        out = torch.empty(front.numel(), rows, outputs)
        signed = weights.reshape(-1, outputs, inner).bitwise_xor(128).view(torch.int8)
        ones = torch.ones(1, inner, dtype=torch.int8)
        units = torch.ones(outputs + 1)
        for own, matrix, result in zip(codes.reshape(-1, rows, 1, inner), signed, out):
            matrix = torch.cat([matrix, ones])[:, :, None, None]
            product = self.conv(matrix, (1, 1), (0, 0), (1, 1))
            sums = product(own[None].permute(0, 3, 1, 2), zero_point, units, None)
            sums = sums[0, :, :, 0].mT
            shifts = sums[:, outputs:] * (128 - weight_zero_point)
            torch.add(sums[:, :outputs], shifts, out=result)
        return out.mul_(scale).reshape(*front, rows, outputs)


def cpu_engine() -> OnednnEngine | str:
    """The engine of this processor, or one sentence why there is none. Where products of 8 bits
    overflow in between (no VNNI) its weights are at most SAFE."""
    missing = [name for name in OPERATORS if not hasattr(torch.ops.onednn, name)]
    if missing:
        return f"this PyTorch ({torch.__version__}) has no operator onednn.{missing[0]}"
    for largest in (128, SAFE):
        if is_exact(OnednnEngine(largest)):
            return OnednnEngine(largest)
    return "the integer products of this processor differ from their definition"


def is_exact(engine: OnednnEngine) -> bool:
    """Whether a convolution and a linear product with the largest weights and codes, padding
    included, give their definition bit for bit."""
    rng = torch.Generator().manual_seed(0)
    weight = torch.randint(-engine.largest, engine.largest, (32, 64, 3, 3), generator=rng)
    weight[::2] = -engine.largest
    weight[1::4] = min(engine.largest, 127)
    codes = torch.randint(0, 256, (2, 64, 6, 6), generator=rng)
    codes[0] = 255
    scale, bias = torch.rand(2, 32, generator=rng)
    for zero_point in (0, 100):
        integers = (codes - zero_point).double()
        sums = F.conv2d(integers, weight.double(), padding=1).float()
        expected = sums * scale[:, None, None] + bias[:, None, None]
        product = engine.conv(weight.to(torch.int8), (1, 1), (1, 1), (1, 1))
        if not torch.equal(product(codes.to(torch.uint8), zero_point, scale, bias), expected):
            return False
        rows, matrix = codes.flatten(1)[:, :576], weight.flatten(1)
        sums = ((rows - zero_point).double() @ matrix.double().T).float()
        product = engine.linear(matrix.to(torch.int8))
        found = product(rows.to(torch.uint8), zero_point, scale, bias)
        if not torch.equal(found, sums * scale + bias):
            return False
    return True

"""The arithmetic of quantization: from interval to scale and zero point, from number to code."""

from typing import Any

import torch

End = int | torch.Tensor  # smallest or largest code
SMALLEST = 1e-30  # below what float32 tells from 0 beside a code


def code_range(bits: int, symmetric: bool) -> tuple[int, int]:
    """Smallest and largest integer code."""
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


def scale_zero_point(
    low: torch.Tensor, high: torch.Tensor, bits: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Interval -> (scale, zero_point), float tensors shaped as low. Asymmetric: scale = (high -
    low)/(2^b - 1), zero_point = -round(low/scale) in 0..2^b-1. Symmetric: scale = max(|low|,
    high)/(2^(b-1) - 1), zero_point = 0."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scale = torch.maximum(-low, high) / max(2 ** (bits - 1) - 1, 1)
        return scale.clamp(min=1e-8), torch.zeros_like(low)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8)
    return scale, (-(low / scale).round()).clamp(0, 2**bits - 1)


def centered_codes(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, low: End, high: End
) -> torch.Tensor:
    """The quantizer: integer code minus zero point, clamp(round(x / scale), low - z, high - z), as
    floats; `low` and `high` are the end codes.

    The one definition of quantization in this library; x / scale is x times the float32 1/scale."""
    code = (x * scale.reciprocal()).round_()
    # clamp with tensors is ten times slower on CPUs
    torch.maximum(code, low - zero_point, out=code)
    return torch.minimum(code, high - zero_point, out=code)


LOG2_TOP = 14  # exponent of the largest integer of the log2 grid


def log2_codes(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Powers of two as integers: round(-log2 x) = q in 0..min(2^b-2, LOG2_TOP) gives 2^(LOG2_TOP -
    q), what lies below gives 0; times the scale 2^-LOG2_TOP that is 2^-q. So more than 4 bits have
    no more codes, which end at 6e-5. Gradients pass straight through. x in [0, 1]."""
    ratio = x * 2.0**LOG2_TOP
    q = (-x.detach().log2()).round().clamp(min=0)  # inf for 0
    last = min(2**bits - 2, LOG2_TOP)
    code = torch.where(q <= last, torch.exp2(LOG2_TOP - q.clamp(max=last)), 0.0)
    return ratio + (code - ratio).detach() if ratio.requires_grad else code


class StraightThrough(torch.autograd.Function):
    """Centred codes with the gradients of LSQ for x and the scale, in few passes over memory.
    `dropped` (or None) is 1 where an element is not rounded but x / scale (QDrop), else 0."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor,
        low: End,
        high: End,
        dropped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The codes of x."""
        code = centered_codes(x, scale, zero_point, low, high)
        if dropped is None and not any(ctx.needs_input_grad):
            return code
        ratio = x * scale.reciprocal()
        ctx.save_for_backward(ratio, scale, low - zero_point, high - zero_point, dropped)
        # by a mask of zeros and ones lerp takes whole values as where does, eight times as fast
        return code if dropped is None else torch.lerp(code, ratio, dropped)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x and the scale."""
        ratio, scale, low, high, dropped = ctx.saved_tensors
        inverse, grad_scale = scale.reciprocal(), None
        # how far inside, below 0 outside: one pass fewer than two comparisons and slow booleans
        room = torch.minimum(ratio - low, high - ratio)
        passed = torch.ops.aten.threshold_backward(grad, room, -SMALLEST)
        if dropped is not None:
            passed = torch.lerp(passed, grad, dropped)
        if ctx.needs_input_grad[1]:
            grad_scale = (passed * ratio).sum_to_size(scale.shape) * -inverse
        return passed * inverse, grad_scale, None, None, None, None

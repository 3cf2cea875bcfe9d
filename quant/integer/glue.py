"""What lies between the products of an integer network, in plain PyTorch: from float32 to codes,
and the norm and activation in front of that. These are the definition; compiled forms
(glue_cpu.py) are used where they give the same bits.

A map is (N, C, H, W), channels_last where an engine wants it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from base.network import NormAct

ScaleShift = tuple[torch.Tensor, torch.Tensor] | None


class Row(NamedTuple):
    """One grid at one time: `inverse` is the float32 1/scale, `low` and `high` are the end codes
    minus the zero point, `zero_point` is that of the unsigned codes 0..255, `balance` the factors
    of channels, shaped to multiply what is quantized."""

    inverse: float
    low: float
    high: float
    zero_point: int
    balance: torch.Tensor | None = None


def integers(x: torch.Tensor, row: Row) -> torch.Tensor:
    """Code minus zero point of x, float32, as quant.grid.centered_codes gives them."""
    x = x.float() if row.balance is None else x.float() * row.balance
    return (x * row.inverse).round_().clamp_(row.low, row.high)


def quantize(x: torch.Tensor, row: Row) -> torch.Tensor:
    """Unsigned codes of x, uint8."""
    return integers(x, row).add_(row.zero_point).to(torch.uint8)


def norm_act(
    x: torch.Tensor,
    norm: NormAct,
    added: torch.Tensor | None = None,
    scale_shift: ScaleShift = None,
) -> torch.Tensor:
    """What a NormAct gives for the same arguments, float32, in fewer steps."""
    if added is not None:
        x = x + added[:, :, None, None]
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return act(y, norm.silu, scale_shift)


def act(y: torch.Tensor, silu: bool, scale_shift: ScaleShift = None) -> torch.Tensor:
    """What follows the group norm in a NormAct; changes y."""
    if scale_shift is not None:
        scale, shift = (part[:, :, None, None] for part in scale_shift)
        y = y.mul_(1 + scale).add_(shift)
    return F.silu(y, inplace=True) if silu else y


def norm_act_quantize(
    x: torch.Tensor,
    norm: NormAct,
    row: Row,
    added: torch.Tensor | None = None,
    scale_shift: ScaleShift = None,
) -> torch.Tensor:
    """Unsigned codes of what a NormAct gives, uint8."""
    return quantize(norm_act(x, norm, added, scale_shift), row)


def rescale(
    acc: torch.Tensor,
    shift_sum: torch.Tensor,
    shifts: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """(acc + shift_sum * shifts) * scale + bias, in `acc`: sums of integers (N, O, H, W) or (...,
    O), `shift_sum` with one channel, the others (O,)."""
    per_channel = [
        t if t is None or acc.dim() != 4 else t[:, None, None] for t in (shifts, scale, bias)
    ]
    shifts, scale, bias = per_channel
    acc.add_(shift_sum * shifts).mul_(scale)
    return acc if bias is None else acc.add_(bias)


def softmax_integers(scores: torch.Tensor, factor: float, row: Row) -> torch.Tensor:
    """Code minus zero point, float32, of the softmax over the last axis of scores * factor."""
    return integers(softmax(scores, factor), row)


def softmax_quantize(scores: torch.Tensor, factor: float, row: Row) -> torch.Tensor:
    """Unsigned codes of the softmax over the last axis of scores * factor, uint8."""
    return quantize(softmax(scores, factor), row)


def softmax(scores: torch.Tensor, factor: float) -> torch.Tensor:
    """As base.network.Softmax."""
    return (scores if factor == 1 else scores * factor).softmax(-1)

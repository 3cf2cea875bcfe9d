"""What lies between the products of an integer network, in plain PyTorch: from float32 to codes, and
the norm and activation in front of that. These are the definition; compiled forms (glue_cpu.py) are
used where they give the same bits.

A map is (N, C, H, W), channels_last where an engine wants it so."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


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


def norm_act(x: torch.Tensor, norm: nn.GroupNorm, silu: bool) -> torch.Tensor:
    """The group norm of a map and, where there is one, the SiLU behind it."""
    y = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return F.silu(y, inplace=True) if silu else y


def norm_act_quantize(x: torch.Tensor, norm: nn.GroupNorm, silu: bool, row: Row) -> torch.Tensor:
    """Both in one: unsigned codes of the normed and activated map, uint8."""
    return quantize(norm_act(x, norm, silu), row)

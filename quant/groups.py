"""Group maps: which scale belongs to which element.

A group map is an integer tensor that broadcasts against one sample of an activation, x[0], or
against a whole weight; the scale in use is `scale[segment][group_of]`. Per tensor, per channel, per
group of channels, per head and the split of concatenated inputs (Q-Diffusion, Li et al. 2023,
arXiv:2302.04304: a shortcut's two parts, whose ranges differ, each with own scales) are all this
one line."""

from collections.abc import Sequence

import torch

Splits = Sequence[int] | None  # channels of each concatenated part


def split_of(splits: Splits, num_channels: int) -> torch.Tensor:
    """(C,) index of the concatenated part each channel belongs to; zeros without splits."""
    if not splits:
        return torch.zeros(num_channels, dtype=torch.long)
    return torch.repeat_interleave(torch.arange(len(splits)), torch.tensor(splits))


def activation_groups(
    per: str, num_channels: int, trailing: int, *, group_size: int = 0, splits: Splits = None
) -> torch.Tensor:
    """Map for an activation with `num_channels` channels followed by `trailing` axes.

    `per`: "tensor" (one group, or one per concatenated part), "channel", "group" (`group_size`
    neighbouring channels), "head" (as channel: in products the first sample axis is the head)."""
    if per == "tensor" and not splits:
        return torch.tensor(0)
    channel = torch.arange(num_channels)
    if per == "tensor":
        group_of = split_of(splits, num_channels)
    elif per in ("channel", "head"):
        group_of = channel
    elif per == "group":
        if group_size < 1:
            raise ValueError(
                "per: group needs group_size, the number of neighbouring channels that share a "
                "scale"
            )
        group_of = channel // group_size
    else:
        raise ValueError(
            f"granularity 'per: {per}' is unknown; choose tensor, channel, group or head"
        )
    return group_of.reshape(num_channels, *[1] * trailing)


def weight_groups(per: str, shape: Sequence[int], *, splits: Splits = None) -> torch.Tensor:
    """Map for a weight (out, in, ...): per "tensor" or row ("channel"), times the parts of `in`."""
    out, inner = shape[0], shape[1]
    if per not in ("tensor", "channel"):
        raise ValueError(
            f"granularity 'per: {per}' is unknown for weights; choose tensor or channel"
        )
    rows = torch.arange(out) if per == "channel" else torch.zeros(out, dtype=torch.long)
    num_rows = out if per == "channel" else 1
    group_of = rows[:, None] + (num_rows * split_of(splits, inner)[None] if splits else 0)
    return group_of.reshape(*group_of.shape, *[1] * (len(shape) - 2))


def num_groups(group_of: torch.Tensor) -> int:
    """How many scales a map asks for."""
    return int(group_of.max()) + 1

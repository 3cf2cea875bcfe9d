"""The quantizer of one tensor: scale and zero point of shape (segments, groups).

Uniform affine quantization: code = clamp(round(x/scale) + z), value = (code - z) * scale. Gradients
are those of LSQ (Esser et al. 2020, arXiv:1902.08153, Eq. 3): rounding passes them straight through
where x lies between the end codes; there the gradient of the value to `scale` is round(x/s) - x/s,
beyond them it is the end code. The code of BRECQ, QDrop and Q-Diffusion counts the half step beyond
an end code, which rounds to it, as inside. Where many values lie there, as the minimum of SiLU
does, that gradient pulls the scale the wrong way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from quant.grid import StraightThrough, code_range, log2_codes
from quant.groups import num_groups
from quant.spec import QuantSpec
from quant.timeline import Timeline


class Quantizer(nn.Module):
    """The quantizer of one tensor, its scales NaN until they are fitted (quant/observer.py).

    `group_of` is a group map as made by quant.groups; `timeline` says the segment (None: static).

    Passes set what forwards heed: `enabled`, whether x is to be quantized, which its layer asks
    (ranges and errors are measured against full precision); while they learn also `drop`, x -> 1
    where an element stays unquantized, else 0 (QDrop), and `soft_scale`, what gives the table of
    scales (quant/scales.py). `made_by` is what gave the table, once it has been learned so."""

    def __init__(self, spec: QuantSpec, group_of: torch.Tensor, timeline: Timeline | None = None):
        super().__init__()
        self.spec, self.timeline = spec, None if spec.static else timeline
        shape = (self.timeline.num_segments if self.timeline else 1, num_groups(group_of))
        self.bits = list(spec.segment_bits) or [spec.bits] * shape[0]
        if len(self.bits) != shape[0]:
            raise ValueError(
                f"segment_bits names {len(self.bits)} widths, the timeline has {shape[0]} segments"
            )
        self.low, self.high = code_range(spec.bits, spec.symmetric)
        self.scale = nn.Parameter(torch.full(shape, float("nan")), requires_grad=False)
        self.register_buffer("zero_point", torch.full(shape, float("nan")))
        self.register_buffer("group_of", group_of, persistent=False)
        self.soft_scale: nn.Module | None = None  # modules of this one as soon as there are any
        self.made_by: nn.Module | None = None
        self.drop: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.enabled = True

    def unfitted(self, timeline: Timeline | None, **changes: Any) -> Quantizer:
        """A fresh one for trials on another timeline, `changes` made to its specification; of the
        nominal width in every segment."""
        spec = replace(self.spec, segment_bits=(), **changes)
        return Quantizer(spec, self.group_of.clone(), timeline).to(self.scale.device)

    def extra_repr(self) -> str:
        """What a printed network says of it."""
        return f"bits={self.spec.bits}, shape={tuple(self.scale.shape)}, range={self.spec.range}"

    def segment(self) -> int | torch.Tensor:
        """The time segment of the coming forward pass, or (N,) those of its samples."""
        return self.timeline.segment if self.timeline else 0

    def table(self, values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Row(s) of a (segments, groups) table for the current segment, to broadcast against x."""
        rows = values[self.segment()]
        # by a number where there is one group: PyTorch waits for a GPU to tell an index of no axes
        groups = self.group_of if self.group_of.dim() else 0
        if rows.dim() == 1:
            return rows[groups]
        rows = rows[:, groups]  # (N, *group map)
        return rows.reshape(len(rows), *[1] * (x.dim() - rows.dim()), *rows.shape[1:])

    @property
    def is_fitted(self) -> bool:
        """Whether every scale is known."""
        return not bool(self.scale.isnan().any())

    @property
    def learnable(self) -> bool:
        """16-bit quantizers (softmax outputs of text models) and fixed grids keep their scale."""
        return self.spec.bits < 16 and self.spec.grid == "uniform"

    def scales(self) -> torch.Tensor:
        """The table of scales in use (segments, groups)."""
        return self.scale if self.soft_scale is None else self.soft_scale()

    def codes(self, x: torch.Tensor) -> torch.Tensor:
        """Centred codes of x, code - zero_point as floats; chosen in float32, always."""
        x = x.float()
        if self.spec.grid == "log2":
            return log2_codes(x, self.spec.bits)
        dropped = None if self.drop is None else self.drop(x)
        if self.soft_scale is None:
            return self.codes_at(self.scale, x, dropped)
        codes = self.soft_scale.codes(self, x)
        if dropped is None:
            return codes
        return torch.lerp(codes, x / self.table(self.scales(), x), dropped)

    def codes_at(
        self, scales: torch.Tensor, x: torch.Tensor, dropped: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Codes with another table of scales than the own one; those that are `dropped`, a mask of
        zeros and ones, are not rounded."""
        scale, zero_point = self.table(scales, x), self.table(self.zero_point, x)
        return StraightThrough.apply(x, scale, zero_point, *self.code_ends(x), dropped)

    def code_ends(self, x: torch.Tensor) -> tuple[int, int] | tuple[torch.Tensor, ...]:
        """Smallest and largest code: numbers, or tables to broadcast if segments differ in bits."""
        ends = [code_range(bits, self.spec.symmetric) for bits in self.bits]
        if len(set(ends)) == 1:
            return ends[0]
        if isinstance(self.segment(), int):
            return ends[self.segment()]
        ends = torch.tensor(ends, device=x.device).float()
        return tuple(self.table(end[:, None].expand_as(self.scale), x) for end in ends.unbind(1))

    @torch.no_grad()
    def harden(self) -> None:
        """Keep what a pass has learned as the table of scales, and how it was made in `made_by`."""
        if self.soft_scale is not None:
            self.scale.copy_(self.soft_scale.hard())
            self.made_by, self.soft_scale = self.soft_scale, None

    def learned_by(self) -> dict[str, nn.Parameter]:
        """Name -> parameter of what gave the table, if it was learned so."""
        return {} if self.made_by is None else dict(self.made_by.named_parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x on its grid: codes times scale."""
        return self.codes(x) * self.table(self.scales(), x)

    def part_scales(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """Scales of a per-tensor quantizer, one per concatenated part, each a scalar or (N, 1, ...)
        to multiply a result with as many axes as x."""
        rows = self.scales()[self.segment()]
        if rows.dim() == 1:
            return rows.unbind()
        return [column.reshape(-1, *[1] * (x.dim() - 1)) for column in rows.unbind(1)]

"""The grids that an integer network quantizes to, as numbers ready for use at every time."""

from __future__ import annotations

import torch

from quant.grid import code_range
from quant.integer.glue import Row
from quant.quantizer import Quantizer
from quant.spec import QuantSpec


class Grid:
    """One scale and zero point for every time segment: those of a per-tensor quantizer, or of one
    concatenated part of it, with the balance of channels in front of it. Unsigned codes count from
    0 where the quantizer's are signed."""

    def __init__(self, q: Quantizer, part: int = 0, balance: torch.Tensor | None = None):
        self.timeline, self.balance = q.timeline, balance
        self.has_codes = max(q.bits) <= 8  # that fit uint8
        self.scales = q.scale.detach()[:, part]  # (segments,)
        inverses = self.scales.reciprocal().tolist()
        self.rows = []
        for bits, inverse, zero_point in zip(q.bits, inverses, q.zero_point[:, part].tolist()):
            low, high = code_range(bits, q.spec.symmetric)
            ends = low - zero_point, high - zero_point
            self.rows.append(Row(inverse, *ends, int(zero_point) - low, balance))

    @property
    def segment(self) -> int:
        """The time segment of the coming forward pass."""
        return self.timeline.segment if self.timeline else 0

    @property
    def row(self) -> Row:
        """The numbers of that segment."""
        return self.rows[self.segment]

    def equals(self, other: Grid) -> bool:
        """Whether both give the same codes to the same values at any time."""
        same = (self.balance is None) == (other.balance is None)
        if same and self.balance is not None:
            same = torch.equal(self.balance, other.balance)
        numbers = [[row[:4] for row in grid.rows] for grid in (self, other)]
        return same and self.timeline is other.timeline and numbers[0] == numbers[1]


def why_no_grid(q: Quantizer | None, most: int = 8) -> str:
    """Why a tensor with this quantizer has no integers of at most `most` bits with one scale; "" if
    it has."""
    return why_no_codes(QuantSpec() if q is None else q.spec, most)


def why_no_codes(spec: QuantSpec, most: int = 8) -> str:
    """The same by what a rule says of the tensor."""
    if spec.bits >= 32:
        return "its input is not quantized"
    if spec.grid != "uniform":
        return f"its codes are on the {spec.grid} grid"
    if spec.per != "tensor":
        return f"its input has a scale for every {spec.per}"
    widest = max(spec.segment_bits or [spec.bits])
    return f"its input has {widest} bits" if widest > most else ""

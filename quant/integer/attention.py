"""Products of activations in an integer network, and the softmax between them.

Queries and keys are multiplied as integers in float32, exactly: their product is as large as what
is gained. Attention maps are handed on as uint8 codes and, where they are large and the engine can,
multiplied with the values on int8."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from quant.integer.grids import Grid
from quant.layers import QuantMatmul

LARGE = 2**18  # entries of one attention map from which on a product on int8 pays


class IntegerMatmul(nn.Module):
    """A QuantMatmul whose operands both have one scale. `scaled` False leaves the product of the
    scales to the softmax that reads it."""

    def __init__(self, matmul: QuantMatmul, engine: Any, glue: Any):
        super().__init__()
        self.roles, self.engine, self.glue = matmul.roles, engine, glue
        self.grids = [Grid(q) for q in (matmul.a_quantizer, matmul.b_quantizer)]
        tables = [grid.scales for grid in self.grids]
        count = max(map(len, tables))
        self.scales = [
            float(math.prod(table[i % len(table)] for table in tables)) for i in range(count)
        ]
        self.scaled = True

    @property
    def scale(self) -> float:
        """s_a * s_b at the time of the coming forward pass."""
        return self.scales[max(grid.segment for grid in self.grids)]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (N, [heads,] rows, inner) @ b (N, [heads,] inner, columns), floats or codes."""
        maps = b if self.roles[1] == "probs" else a
        is_map = maps.dtype is torch.uint8 and maps.shape[-1] * maps.shape[-2] >= LARGE
        if is_map and hasattr(self.engine, "matmul") and self.engine.largest == 128:
            return self._on_int8(a, b)
        out = self._integers(a, 0) @ self._integers(b, 1)
        return out.mul_(self.scale) if self.scaled else out

    def _integers(self, x, operand):
        row = self.grids[operand].row
        if x.dtype is torch.uint8:
            return x.float().sub_(row.zero_point)
        return self.glue.integers(x, row)

    def _codes(self, x, operand):
        return x if x.dtype is torch.uint8 else self.glue.quantize(x, self.grids[operand].row)

    def _on_int8(self, a, b):
        """The attention map is what is multiplied, the values are the weights."""
        codes = self._codes(a, 0), self._codes(b, 1).mT
        points = [grid.row.zero_point for grid in self.grids]
        if self.roles[1] == "probs":  # values @ maps: the transpose of maps @ values
            given = codes[1], points[1], codes[0], points[0]
            return self.engine.matmul(*given, self.scale).mT
        return self.engine.matmul(codes[0], points[0], codes[1], points[1], self.scale)


class IntegerSoftmax(nn.Module):
    """A Softmax whose only reader takes codes of `grid`; `scores` is the product that it reads if
    nothing else does, which then leaves its scale to this."""

    def __init__(self, grid: Grid, scores: IntegerMatmul | None, glue: Any):
        super().__init__()
        self.grid, self.glue = grid, glue
        self.scale_of = None if scores is None else scores.scales
        self.scores_grids = [] if scores is None else scores.grids

    def forward(self, scores: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Codes of the softmax of scores (..., L, L keys) * factor over the keys, uint8."""
        if self.scale_of is not None:
            scale = self.scale_of[max(grid.segment for grid in self.scores_grids)]
            if factor != 1:  # two roundings, as defined
                scores = scores.mul_(scale)
            else:
                factor = scale
        return self.glue.softmax_quantize(scores, factor, self.grid.row)

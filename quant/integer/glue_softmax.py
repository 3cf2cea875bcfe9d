"""Codes of softmax outputs on the CPU: those of glue_softmax.h, compiled, as far as it gives the
bits of quant/integer/glue.py, which computes everything else."""

from __future__ import annotations

import ctypes

import torch

from quant.integer import glue
from quant.integer.glue import Row

# rows that fill no vector, some vectors, and those with a rest
COLUMNS = 1, 3, 7, 8, 9, 15, 16, 17, 33, 64, 77, 100, 256, 1000, 1024
EXACT = Row(2.0**120, -(2.0**121), 2.0**121, 0)  # on which float32 probabilities keep their bits


class CompiledSoftmax:
    """That of a library built from glue.cpp. `same`: whether its bits are those of PyTorch; if not,
    plain PyTorch does everything."""

    def __init__(self, library: ctypes.CDLL):
        self.library, self.same = library, True
        self.same = self._is_same()

    def quantize(self, scores: torch.Tensor, factor: float, row: Row) -> torch.Tensor:
        """As glue.softmax_quantize."""
        if not self._takes(scores, row):
            return glue.softmax_quantize(scores, factor, row)
        codes = torch.empty_like(scores, dtype=torch.uint8)
        self._call(scores, codes.data_ptr(), None, factor, row)
        return codes

    def integers(self, scores: torch.Tensor, factor: float, row: Row) -> torch.Tensor:
        """As glue.softmax_integers."""
        if not self._takes(scores, row):
            return glue.softmax_integers(scores, factor, row)
        out = torch.empty_like(scores)
        self._call(scores, None, out.data_ptr(), factor, row)
        return out

    def _takes(self, scores, row):
        filled = scores.is_contiguous() and scores.numel() > 0 and scores.dim() > 0
        return self.same and filled and scores.dtype is torch.float32 and row.balance is None

    def _call(self, scores, codes, out, factor, row):
        columns = scores.shape[-1]
        sizes = scores.numel() // columns, columns
        self.library.glue_softmax(
            scores.data_ptr(), codes, out, *sizes, factor, *row[:4], torch.get_num_threads()
        )

    def _is_same(self):
        """Whether it gives the bits of plain PyTorch for rows of all lengths."""
        rng = torch.Generator().manual_seed(0)
        for columns in COLUMNS:
            scores = torch.randn(12, columns, generator=rng)
            scores *= 10 ** torch.linspace(-2, 2, 12)[:, None]  # alike to far apart
            scores[0] = 0.3
            scores[2:6, 1::3] = -torch.inf  # masked
            codes = Row(255.0, -100.0, 155.0, 100)
            for factor, row in ((1.0, EXACT), (0.37, EXACT), (3.1, codes)):
                given = scores, factor, row
                integers = torch.equal(self.integers(*given), glue.softmax_integers(*given))
                if not integers or not torch.equal(
                    self.quantize(scores, factor, codes),
                    glue.softmax_quantize(scores, factor, codes),
                ):
                    return False
        return True

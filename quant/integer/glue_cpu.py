"""The glue of an integer network in one or two passes over memory, on the CPU: glue.cpp, compiled
where a compiler is at hand and used as far as it gives the bits of quant/integer/glue.py, which
computes everything else."""

from __future__ import annotations

import ctypes
import itertools

import torch
import torch.nn.functional as F

from base.network import NormAct
from quant.integer import glue
from quant.integer.glue import Row, ScaleShift
from quant.integer.glue_build import capability, library
from quant.integer.glue_softmax import CompiledSoftmax

LARGE = 1024  # pixels of a map from which on PyTorch's group norm sums otherwise
SILU_BLOCKS = (16, 32)  # elements that PyTorch's SiLU may take at once
# how PyTorch's compiler may have rounded its group norm, the usual first (Rounding of glue_norm.h):
# squares of small maps, of large ones, the variance, the result
ROUNDINGS = list(itertools.product((0, 1), (1, 0), (1, 2, 0), (1, 0)))
NO_GRID = None, 1.0, 0.0, 0.0, 0


class Glue:
    """The functions of quant/integer/glue.py, and `about`: one sentence on what computes them."""

    quantize, integers = staticmethod(glue.quantize), staticmethod(glue.integers)
    norm_act, rescale = staticmethod(glue.norm_act), staticmethod(glue.rescale)
    norm_act_quantize = staticmethod(glue.norm_act_quantize)
    softmax_quantize = staticmethod(glue.softmax_quantize)
    softmax_integers = staticmethod(glue.softmax_integers)

    def __init__(self, about: str):
        self.about = about


def load(compiled: bool = True) -> Glue:
    """The glue of the CPU: compiled where that can be and gives the same bits, else (or where it is
    not wanted) in plain PyTorch."""
    if not compiled:
        return Glue("plain PyTorch")
    try:
        return CompiledGlue(library())
    except (OSError, ValueError) as error:
        return Glue(f"plain PyTorch: {error}")


class CompiledGlue(Glue):
    """That of a library built from glue.cpp. What it cannot do, other layouts above all, plain
    PyTorch does. Raises ValueError where its bits are others than those of plain PyTorch.

    Group norms are compared with PyTorch's once for every number of channels and groups, which is
    used where they differ: its compiler rounded some channels of a group otherwise than others."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        # (channels, groups, large) -> which channels of a group have an offset rounded once
        self.fused: dict[tuple[int, int, bool], torch.Tensor | None] = {}
        self.rounding = (ctypes.c_int * 5)(*ROUNDINGS[0], 0)
        self.about = f"compiled for {capability()}"
        for size in SILU_BLOCKS:
            self.rounding[4] = size
            if self._gives_elementwise():
                break
        else:
            raise ValueError("the compiled glue gives other bits")
        self.same_norms = self._choose_rounding()
        if not self.same_norms:
            self.about += ", group norms by PyTorch"
        softmax = CompiledSoftmax(library)
        self.softmax_quantize, self.softmax_integers = softmax.quantize, softmax.integers
        if not softmax.same:
            self.about += ", softmax by PyTorch"

    def __reduce__(self):
        return load, ()

    def quantize(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """As glue.quantize."""
        codes = self._codes(x, row, torch.uint8)
        return glue.quantize(x, row) if codes is None else codes

    def integers(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """As glue.integers."""
        codes = self._codes(x, row, torch.float32)
        return glue.integers(x, row) if codes is None else codes

    def _codes(self, x, row, dtype):
        layout = _rows_of(x, row.balance)
        if layout is None:
            return None
        codes = torch.empty_like(x, dtype=dtype)
        outs = _outs(codes)
        self.library.glue_quantize(
            x.data_ptr(), *outs, *layout, *_numbers(row), torch.get_num_threads()
        )
        return codes

    def norm_act(
        self,
        x: torch.Tensor,
        norm: NormAct,
        added: torch.Tensor | None = None,
        scale_shift: ScaleShift = None,
    ) -> torch.Tensor:
        """As glue.norm_act."""
        y = self._norm(x, norm, None, added, scale_shift)
        return glue.norm_act(x, norm, added, scale_shift) if y is None else y

    def norm_act_quantize(
        self,
        x: torch.Tensor,
        norm: NormAct,
        row: Row,
        added: torch.Tensor | None = None,
        scale_shift: ScaleShift = None,
    ) -> torch.Tensor:
        """As glue.norm_act_quantize."""
        codes = self._norm(x, norm, row, added, scale_shift)
        if codes is None:
            return glue.norm_act_quantize(x, norm, row, added, scale_shift)
        return codes

    def _norm(self, x, norm, row, added, scale_shift):
        shift = scale = None
        if scale_shift is not None:
            scale, shift = scale_shift
            if scale.stride() != shift.stride():
                return None
        tables = [t for t in (added, scale, shift) if t is not None]
        if not _is_map(x) or not all(map(_is_table, tables)):
            return None
        gamma, beta, fused = norm.weight, norm.bias, self._fused_of(x, norm)
        if fused is None:  # only what follows the norm
            x = x if added is None else x + added[:, :, None, None]
            x = F.group_norm(x, norm.num_groups, gamma, beta, norm.eps)
            added = gamma = beta = None
        return self._apply(x, norm, gamma, beta, fused, row, added, scale, shift)

    def _apply(self, x, norm, gamma, beta, fused, row, added=None, scale=None, shift=None):
        samples, channels, height, width = x.shape
        out = torch.empty_like(x, dtype=torch.float32 if row is None else torch.uint8)
        self.library.glue_norm_act(
            x.data_ptr(), *_outs(out), samples, height * width, channels, norm.num_groups,
            _pointer(gamma), _pointer(beta), norm.eps,
            _pointer(added), 0 if added is None else added.stride(0),
            _pointer(scale), _pointer(shift), 0 if scale is None else scale.stride(0),
            norm.silu, *(NO_GRID if row is None else _numbers(row)), _pointer(fused), self.rounding,
            torch.get_num_threads(),
        )  # fmt: skip
        return out

    def rescale(
        self,
        acc: torch.Tensor,
        shift_sum: torch.Tensor,
        shifts: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """As glue.rescale."""
        channels = acc.shape[1 if acc.dim() == 4 else -1]
        dense = _is_map(acc) if acc.dim() == 4 else acc.is_contiguous()
        if not dense or acc.numel() != shift_sum.numel() * channels:
            return glue.rescale(acc, shift_sum, shifts, scale, bias)
        pointers = map(_pointer, (acc, shift_sum.contiguous(), shifts, scale, bias))
        rows = shift_sum.numel()
        self.library.glue_rescale(*pointers, rows, channels, torch.get_num_threads())
        return acc

    def _fused_of(self, x, norm):
        if not self.same_norms:
            return None
        large = x.shape[2] * x.shape[3] >= LARGE
        key = norm.num_channels, norm.num_groups, large
        if key not in self.fused:
            self.fused[key] = self._compare_norm(*key)
        return self.fused[key]

    def _compare_norm(self, channels, groups, large):
        """For every channel of a group 1 where its offset is rounded once, (channels / groups,)
        uint8; None if the norm of this many channels differs from PyTorch's in any way."""
        rng, samples = torch.Generator().manual_seed(0), max(1, 128 // groups)
        size = 32 if large else 5
        x = torch.randn(samples, size, size, channels, generator=rng).permute(0, 3, 1, 2)
        x = 2 * x + 1 + torch.rand(samples, channels, 1, 1, generator=rng)  # means that weigh
        x[:, :, 0, 0] = 0.0  # here the norm is its offset
        norm = NormAct(channels, num_groups=groups, eps=1e-5, silu=False).requires_grad_(False)
        norm.weight.uniform_(1, 2, generator=rng)
        last = torch.randint(-(2**20), 2**20, (channels,), generator=rng) * 8 + 5
        norm.bias.copy_(last / 2**26)  # last bits in which one and two roundings differ often
        given = norm.weight, norm.bias, samples, channels, size * size, groups, norm.eps
        y, mean, rstd = torch.native_group_norm(x, *given)
        offset = y[:, :, 0, 0].contiguous()
        fused = torch.empty(channels // groups, dtype=torch.uint8)
        pointers = map(_pointer, (offset, mean, rstd, norm.weight, norm.bias))
        sizes = samples, groups, len(fused)
        if not self.library.glue_fused_bias(*pointers, *sizes, fused.data_ptr()):
            return None
        same = torch.equal(self._apply(x, norm, norm.weight, norm.bias, fused, None), y)
        return fused if same else None

    def _choose_rounding(self):
        """Whether with one of the roundings norms of few and many channels are PyTorch's."""
        for rounding in ROUNDINGS:
            self.rounding[:4] = rounding
            cases = itertools.product((1, 4, 8, 12), (False, True))
            if all(self._compare_norm(8 * d, 8, large) is not None for d, large in cases):
                return True
        return False

    def _gives_elementwise(self):
        """Whether everything but norms gives the bits of plain PyTorch on values of all sizes."""
        rng = torch.Generator().manual_seed(0)
        maps = torch.randn(3, 37, 33, 29, generator=rng).permute(0, 3, 1, 2)
        maps = maps * 10 ** (4 * torch.rand(maps.shape, generator=rng) - 2)
        maps[0, :, 0, 0] = torch.arange(29) / 4 - 3  # ties
        balance = torch.rand(29, 1, 1, generator=rng) + 0.5
        film = tuple(torch.randn(3, 58, generator=rng).chunk(2, 1))
        added, norm = torch.randn(3, 29, generator=rng), NormAct(29, num_groups=1, eps=0.0)
        for row in (Row(2.0, -8, 7, 8), Row(0.7, -128, 127, 128, balance)):
            acted = glue.quantize(glue.act(maps + added[:, :, None, None], True, film), row)
            found = self._apply(maps, norm, None, None, None, row, added, *film)
            same = torch.equal(acted, found)
            for ours, plain in (self.quantize, glue.quantize), (self.integers, glue.integers):
                same &= torch.equal(ours(maps, row), plain(maps, row))
            if not same:
                return False
        short = [torch.randn(1, 31, 1, 1, generator=rng) for _ in range(64)]
        return all(
            torch.equal(self._apply(x, norm, None, None, None, None), F.silu(x))
            for x in [maps, *short]
        )


def _pointer(t):
    return None if t is None else t.data_ptr()


def _outs(t):
    """(codes, out) for the library, one of them null."""
    return (t.data_ptr(), None) if t.dtype is torch.uint8 else (None, t.data_ptr())


def _numbers(row):
    return _pointer(row.balance), row.inverse, row.low, row.high, row.zero_point


def _is_map(x):
    """Whether x is a dense channels_last map, float32, and cannot be taken for another layout."""
    dense = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return dense and x.dtype is torch.float32 and not x.is_contiguous()


def _is_table(t):
    return t.dtype is torch.float32 and t.stride(1) == 1


def _rows_of(x, balance):
    """(rows, columns, distance of rows) of float32 values in the order of memory; with a balance
    the columns are its channels. None where they lie otherwise."""
    if x.dtype is not torch.float32:
        return None
    if balance is None and (x.is_contiguous() or _is_map(x)):
        return 1, x.numel(), x.numel()
    axes = sorted((stride, size) for stride, size in zip(x.stride(), x.shape) if size > 1)
    if not axes or axes[0][0] != 1:
        return None
    if balance is not None:
        axis = -balance.dim()
        if x.stride(axis) != 1 or x.shape[axis] != balance.numel() or balance.numel() == 1:
            return None
    columns, rest = axes[0][1], axes[1:]
    while balance is None and rest and rest[0][0] == columns:
        columns, rest = columns * rest[0][1], rest[1:]
    distance, rows = (rest[0][0] if rest else columns), 1
    for stride, size in rest:
        if stride != distance * rows:
            return None
        rows *= size
    return rows, columns, distance

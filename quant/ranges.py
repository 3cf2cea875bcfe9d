"""Range searches: values (groups, K) -> the clipping interval (low, high) of each group, vectorised
over groups.

    minmax      the extremes
    percentile  what leaves out a fraction `tail` at either end
    mse, mse2d  argmin over candidates (low, high) of mean |x - Q(x; low, high)|^p; 1-D (both ends
                shrunk alike) or 2-D

The searches are those of the code that the field shares: BRECQ (Li et al. 2021, arXiv:2102.05426),
QDrop (Wei et al. 2022, arXiv:2203.05740), Q-Diffusion (Li et al. 2023, arXiv:2302.04304). One set
of candidates serves all methods; PTQ4DM and EDA-DM have others (R i / 100 for i = 1 .. 100, EDA-DM
those of a symmetric interval).

The interval always contains zero, so zero is exactly representable (convolutions pad with it)."""

from typing import Any

import torch
import torch.nn.functional as F

from quant.grid import centered_codes, code_range, scale_zero_point

NORM = 2.4  # p of the searches
NUM_SHRINKS = 80  # candidates of the 1-D search: both ends times 1.00, 0.99, ..., 0.21
CHUNK_ELEMENTS = 2**18  # working set of one batch of candidates, which a cache holds
VECTOR = 64  # values, a multiple of what any processor has
CLOSE = 1e-4  # relative difference of errors that estimates do not decide

Interval = tuple[torch.Tensor, torch.Tensor]  # low, high, (groups,) each


def minmax(values: torch.Tensor, bits: int, symmetric: bool) -> Interval:
    """The extremes."""
    return values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)


def percentile(values: torch.Tensor, bits: int, symmetric: bool, tail: float = 0.001) -> Interval:
    """Leave out the fraction `tail` of the values at either end."""
    ordered, last = values.sort(dim=1).values, values.shape[1] - 1
    left_out = round(tail * last)
    return ordered[:, left_out].clamp(max=0), ordered[:, last - left_out].clamp(min=0)


def search_1d(values: torch.Tensor, bits: int, symmetric: bool) -> Interval:
    """Shrink both ends together; keep the (first) candidate of least mean |x - Q(x)|^2.4."""
    low, high = minmax(values, bits, symmetric)
    steps = torch.arange(NUM_SHRINKS, dtype=values.dtype, device=values.device)
    factors = 1 - 0.01 * steps[:, None]
    return _best(values, low[None] * factors, high[None] * factors, bits, symmetric)


def search_2d(values: torch.Tensor, bits: int, symmetric: bool) -> Interval:
    """Both ends on their own (QDrop's search for two-sided data): from the best of the 1-D search
    on, rounds of nearby zero points and widths, in ever smaller steps of the zero point. Costs 2 (4
    bits) to 3.5 (8 bits) of the 1-D search; all 100 widths x 2^b zero points would cost 20 and
    more, for ranges measured no better."""
    best = search_1d(values, bits, symmetric)
    if symmetric:
        return best
    levels = 2**bits - 1
    factors = torch.linspace(0.8, 1.2, 9, dtype=values.dtype, device=values.device)
    for stride in (2**power for power in reversed(range(bits - 1))):
        scale, zero = scale_zero_point(*best, bits, symmetric)
        zeros = torch.stack([zero - stride, zero, zero + stride]).clamp(0, levels)
        widths = (scale * levels)[None, None] * factors[:, None, None]
        lows, highs = _intervals(widths, zeros[None], levels)
        lows, highs = torch.cat([best[0][None], lows]), torch.cat([best[1][None], highs])
        best = _best(values, lows, highs, bits, symmetric)
    return best


def _intervals(width, zero, levels):
    """Candidate widths (W, 1, G) and zero points (1, Z, G) -> ends (W*Z, G)."""
    low = -zero * width / levels
    return low.flatten(0, 1), (low + width).flatten(0, 1)


def _best(values, lows, highs, bits, symmetric):
    """Candidate ends (N, G) -> the (first) pair with the least error for each group. All errors are
    estimated first, by exp and log, which take a fifth of the time of pow; pow then decides between
    those whose estimates are as good as equal."""
    ends = code_range(bits, symmetric)
    scales, zeros = scale_zero_point(lows, highs, bits, symmetric)
    size = max(1, CHUNK_ELEMENTS // values.numel())
    parts = zip(scales[:, :, None].split(size), zeros[:, :, None].split(size))
    estimates = torch.cat([_error(values[None], *part, ends, _estimated_power) for part in parts])
    close = estimates <= estimates.amin(0) * (1 + CLOSE)
    errors, size = torch.full_like(estimates, torch.inf), max(1, CHUNK_ELEMENTS // values.shape[1])
    for i, group in zip(*(index.split(size) for index in close.nonzero(as_tuple=True))):
        scale, zero = scales[i, group][:, None], zeros[i, group][:, None]
        errors[i, group] = _error(values[group], scale, zero, ends, _power)
    best = errors.argmin(0, keepdim=True)
    return lows.gather(0, best)[0], highs.gather(0, best)[0]


def _error(values, scale, zero, ends, power):
    """Mean |x - Q(x)|^p over the last axis."""
    codes = centered_codes(values, scale, zero, *ends)
    return power(codes.mul_(scale).sub_(values).abs_()).mean(-1)


def _power(error):
    """In whole vectors of the processor: what is left over rounds otherwise, and equal candidates
    would not be equal."""
    count = error.numel()
    return F.pad(error.flatten(), (0, -count % VECTOR)).pow_(NORM)[:count].view_as(error)


def _estimated_power(error):
    return error.log_().mul_(NORM).exp_()


RANGES = {"minmax": minmax, "percentile": percentile, "mse": search_1d, "mse2d": search_2d}


def find_range(
    name: str, values: torch.Tensor, bits: int, symmetric: bool, **options: Any
) -> Interval:
    """Run the search called `name`; raises ValueError that quotes an unknown word."""
    if name not in RANGES:
        raise ValueError(f"range search '{name}' is unknown; choose one of {', '.join(RANGES)}")
    return RANGES[name](values, bits, symmetric, **options)

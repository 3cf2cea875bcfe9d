"""Range searches against closed forms, brute force and loops."""

import itertools

import numpy as np
import pytest
import torch
from tiny import normal

from quant import ranges
from quant.grid import centered_codes, code_range, scale_zero_point
from quant.ranges import NORM, RANGES, find_range

BITS = (2, 3, 4, 5, 6, 7, 8)
SKEWED = normal(3, 400).exp() - 0.7  # two-sided with one long tail


def error(values, ends, bits, symmetric=False):
    """mean |x - Q(x)|^2.4 of each group."""
    scale, zero = (v[:, None] for v in scale_zero_point(*ends, bits, symmetric))
    codes = centered_codes(values, scale, zero, *code_range(bits, symmetric))
    return (values - codes * scale).abs().double().pow(NORM).mean(1)


def brute_error(x, low, high, bits):
    """The formula for one interval and float64 values, written out."""
    scale = (high - low) / (2**bits - 1)
    zero = round(-low / scale)
    codes = np.clip(np.round(x / scale) + zero, 0, 2**bits - 1)
    return np.mean(np.abs(x - (codes - zero) * scale) ** NORM)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS + (16,))
def test_zero_is_exact_and_codes_are_integers_in_range(bits, symmetric):
    for shift, name in itertools.product(
        (-9.0, -0.3, 0.0, 0.3, 9.0), ("minmax", "percentile", "mse")
    ):
        values = normal(4, 60) + shift
        scale, zero = scale_zero_point(*find_range(name, values, bits, symmetric), bits, symmetric)
        low, high = code_range(bits, symmetric)
        assert (
            torch.equal(zero, zero.round()) and (zero >= max(low, 0)).all() and (zero <= high).all()
        )
        codes = centered_codes(values, scale[:, None], zero[:, None], low, high) + zero[:, None]
        assert torch.equal(codes, codes.round()) and codes.min() >= low and codes.max() <= high
        assert (
            centered_codes(torch.zeros(4, 1), scale[:, None], zero[:, None], low, high) == 0
        ).all()


def test_scale_and_zero_point_of_known_intervals():
    low, high = torch.tensor([-1.0, 1.0, -6.0, 0.0]), torch.tensor([2.0, 3.0, -3.0, 0.0])
    scale, zero = scale_zero_point(low, high, 2, symmetric=False)
    assert torch.equal(scale, torch.tensor([1.0, 1.0, 2.0, 1e-8])) and zero.tolist() == [1, 0, 3, 0]
    scale, zero = scale_zero_point(low, high, 3, symmetric=True)
    assert torch.equal(scale, torch.tensor([2 / 3, 1.0, 2.0, 1e-8])) and zero.tolist() == [
        0,
        0,
        0,
        0,
    ]
    assert code_range(3, True) == (-4, 3) and code_range(3, False) == (0, 7)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("name", RANGES)
def test_groups_at_once_equal_a_loop_over_groups(name, bits, symmetric):
    factors, shifts = torch.tensor([[1e-3, 0.1, 1, 10, 1e3], [0, 0.2, -3, 0, 2e3]])
    values = normal(5, 70) * factors[:, None] + shifts[:, None]
    together = find_range(name, values, bits, symmetric)
    alone = [find_range(name, row[None], bits, symmetric) for row in values]
    for found, expected in zip(together, zip(*alone)):
        assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("bits", BITS)
def test_1d_search_is_the_brute_force_loop(bits):
    # best cut at the last candidate
    crowd = torch.cat([torch.linspace(0, 0.1, 5000), torch.ones(1)])[None]
    for values in (SKEWED, normal(3, 300, seed=1), normal(3, 300, seed=2).abs(), crowd):
        low, high = find_range("mse", values, bits, False)
        for row, found_low, found_high in zip(values, low, high):
            ends = min(float(row.min()), 0), max(float(row.max()), 0)
            trials = [(1 - 0.01 * i) for i in range(80)]
            errors = [
                brute_error(row.double().numpy(), ends[0] * f, ends[1] * f, bits) for f in trials
            ]
            best = trials[int(np.argmin(errors))]
            assert float(found_low) == pytest.approx(best * ends[0], rel=1e-5, abs=1e-9)
            assert float(found_high) == pytest.approx(best * ends[1], rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_2d_search_comes_near_the_least_error_of_all_pairs(bits):
    values, levels = SKEWED[:, ::4], 2**bits - 1
    found = error(values, find_range("mse2d", values, bits, False), bits)
    for row, reached in zip(values.double().numpy(), found):
        width = row.max() - row.min()
        least = min(
            brute_error(row, -z * w / levels, w - z * w / levels, bits)
            for w in width * np.arange(1, 101) / 100
            for z in range(levels + 1)
        )
        assert float(reached) <= least * 1.01


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_searches_are_never_worse_than_minmax(bits, symmetric):
    widest = error(SKEWED, find_range("minmax", SKEWED, bits, symmetric), bits, symmetric)
    for name in ("mse", "mse2d"):
        assert (
            error(SKEWED, find_range(name, SKEWED, bits, symmetric), bits, symmetric) <= widest
        ).all()


@pytest.mark.parametrize("bits", BITS)
def test_2d_search_is_never_worse_than_1d_on_skewed_values(bits):
    one, two = (
        error(SKEWED, find_range(name, SKEWED, bits, False), bits) for name in ("mse", "mse2d")
    )
    assert (two <= one * (1 + 1e-5)).all()


def test_2d_search_gives_the_codes_to_the_crowded_side():
    """One value at -1, a crowd in [0, 1]: shrinking both ends together wastes half of the codes."""
    values = torch.cat([torch.tensor([-1.0]), torch.linspace(0, 1, 4000)])[None]
    one, two = (error(values, find_range(name, values, 3, False), 3) for name in ("mse", "mse2d"))
    assert float(two) < 0.5 * float(one)


def test_working_set_does_not_change_the_search(monkeypatch):
    whole = find_range("mse", SKEWED, 4, False)
    monkeypatch.setattr(ranges, "CHUNK_ELEMENTS", 1)
    assert all(map(torch.equal, whole, find_range("mse", SKEWED, 4, False)))


def test_percentile_of_an_even_ladder():
    ladder = torch.arange(-500.0, 501.0)[torch.randperm(1001)][None]
    assert find_range("percentile", ladder, 8, False, tail=0.01) == (-490, 490)
    assert find_range("percentile", ladder + 600, 8, False, tail=0.01) == (0, 1090)
    assert (
        find_range("percentile", ladder, 8, False, tail=0.0)
        == find_range("minmax", ladder, 8, False)
        == (-500, 500)
    )


def test_all_zero_values_stay_zero():
    for name in RANGES:
        scale, zero = scale_zero_point(*find_range(name, torch.zeros(1, 9), 4, False), 4, False)
        assert torch.equal(
            centered_codes(torch.zeros(1, 9), scale, zero, 0, 15) * scale, torch.zeros(1, 9)
        )


def test_unknown_search_is_quoted():
    with pytest.raises(ValueError, match="'mes' is unknown; choose one of minmax"):
        find_range("mes", SKEWED, 4, False)

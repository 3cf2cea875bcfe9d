"""The correction's tables and the statistics that fill them, in closed form."""

import numpy as np
import pytest
import torch
from conftest import assert_close
from corrections import TIMES, filled
from tiny import normal

from quant.network import Correction
from quant.passes.correct_noise import SUMMED, fit, sums

EVERYTHING = {"slope": True, "bias": "residual", "variance": True}


def bias_of(tables):
    """b (C, H, W) of the tables of one time."""
    return tables["rows"] + tables["columns"]


@pytest.mark.parametrize("num_channels", [3, 6])
def test_zero_tables_are_the_identity_bit_for_bit(num_channels):
    answer = normal(4, num_channels, 2, 2)
    answer[0, 0] = -0.0
    found = Correction(TIMES, 3, 2, 2).eps(answer, TIMES)
    assert torch.equal(found, answer) and torch.equal(found.signbit(), answer.signbit())


def test_every_image_is_corrected_at_its_own_time():
    correction, answer = filled(TIMES, 4, 5), normal(3, 6, 4, 5)
    found = correction.eps(answer, torch.tensor([30.0, 0.0, 100.0]))
    for image, i in enumerate((2, 0, 3)):
        for c, h, w in np.ndindex(3, 4, 5):
            b = correction.rows[i, c, h, 0] + correction.columns[i, c, 0, w]
            assert torch.equal(
                found[image, c, h, w], (answer[image, c, h, w] - b) / (1 + correction.slope[i])
            )
    # a learned variance is left alone
    assert torch.equal(found[:, 3:], answer[:, 3:])


def test_a_time_without_statistics_snaps_to_a_near_one_or_is_refused():
    correction = filled()
    assert correction.entries(torch.tensor([0, 4.9, 5.0, 15, 21, 66, 110, 135])).tolist() == [
        0,
        0,
        0,
        1,
        2,
        3,
        3,
        3,
    ]
    # 30 reaches as far up as down, half way to 10
    for t in (-6.0, 40.5, 135.5):
        with pytest.raises(
            ValueError, match=f"no statistics for time {t:g} .it has 4 times from 0 to 100.; sample"
        ):
            correction.eps(normal(2, 3, 2, 2), torch.tensor([0.0, t]))
    lone = filled(torch.tensor([500.0]))
    assert lone.noise_variance(500) == float(lone.variance[0])
    with pytest.raises(ValueError, match="for time 501 "):
        lone.noise_variance(501)


def planted(k, bias, deviation, num=200):
    """eps e and its error d = k e + bias_c + noise."""
    e = normal(num, 3, 8, 8, seed=1) + torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    return e, k * e + torch.tensor(bias)[:, None, None] + deviation * normal(num, 3, 8, 8, seed=2)


def test_running_sums_equal_those_of_the_whole():
    e, d = planted(0.1, [0.1, -0.2, 0.3], 0.05, num=10)
    whole = sums(e, d)
    assert_close(sum(sums(a, b) for a, b in zip(e.split(3), d.split(3))), whole, 1e-14)
    assert_close(sums(e, d, SUMMED["line"]).sum((2, 3), keepdim=True), whole, 1e-13)
    for c in range(3):
        a, b = e[:, c].double(), d[:, c].double()
        expected = torch.stack(
            [torch.tensor(640.0), a.sum(), b.sum(), (a * b).sum(), (a * a).sum(), (b * b).sum()]
        )
        assert_close(whole[:, c].flatten(), expected, 1e-12)


def test_planted_slope_bias_and_variance_are_found():
    k, bias, deviation = 0.12, [0.1, -0.05, 0.02], 0.07
    # One regression for all channels sees the biases along with the channels' own means: plant
    # means that do not agree.
    e, d = planted(k, bias, deviation)
    e, d = e - e.mean((0, 2, 3), keepdim=True), d - k * e.mean((0, 2, 3), keepdim=True)
    found = fit(sums(e, d), **EVERYTHING)
    # 5 standard deviations: 5 * 0.07 / sqrt(38400)
    assert float(found["slope"]) == pytest.approx(k, abs=2e-3)
    assert bias_of(found).flatten().tolist() == pytest.approx(bias, abs=4e-3)
    assert float(found["variance"]) == pytest.approx((deviation / (1 + k)) ** 2, rel=0.04)
    assert float(found["mse_before"]) == pytest.approx(float(d.double().square().mean()))


def test_closed_form_equals_the_definition():
    e, d = (a.double() for a in planted(0.12, [0.1, -0.05, 0.02], 0.07, num=5))
    k = np.polyfit(e.flatten().numpy(), d.flatten().numpy(), 1)[0]
    r, total = d - k * e, fit(sums(e, d), True, "total", True)
    found = fit(sums(e, d), **EVERYTHING)
    assert float(found["slope"]) == pytest.approx(k, rel=1e-9)
    assert_close(bias_of(found).flatten(), r.mean((0, 2, 3)), 1e-9)
    assert_close(found["variance"], r.var((0, 2, 3), correction=0).mean() / (1 + k) ** 2, 1e-9)
    assert_close(bias_of(total).flatten(), d.mean((0, 2, 3)), 1e-9)
    assert torch.equal(total["variance"], found["variance"])
    for tables in (found, total):
        corrected = (e + d - bias_of(tables)) / (1 + k)
        assert_close(tables["mse_after"], (corrected - e).square().mean(), 1e-9)


def test_a_bias_per_line_is_the_nearest_sum_of_rows_and_columns():
    """Least squares of the residuals over the lines of every channel, as a general solver has
    them."""
    e, d = (a.double() for a in planted(-0.2, [0.0, 0.0, 0.0], 0.07, num=50))
    # a map, the same in all images
    d += normal(3, 8, 8, seed=3).double()
    k = np.polyfit(e.flatten().numpy(), d.flatten().numpy(), 1)[0]
    r, found = d - k * e, fit(sums(e, d, SUMMED["line"]), "signed", "residual", True)
    assert float(found["slope"]) == pytest.approx(k, rel=1e-9) and k < -0.1
    lines = torch.zeros(8, 8, 16, dtype=torch.float64)
    lines[range(8), :, range(8)] = 1
    lines[:, range(8), range(8, 16)] = 1
    lines = lines.reshape(64, 16)
    for c in range(3):
        wanted = lines @ np.linalg.lstsq(lines, r[:, c].mean(0).flatten(), rcond=None)[0]
        assert_close(bias_of(found)[c].flatten(), wanted, 1e-9)
    assert_close(found["variance"], r.var(0, correction=0).mean() / (1 + k) ** 2, 1e-9)
    assert_close(found["mse_after"], ((e + d - bias_of(found)) / (1 + k) - e).square().mean(), 1e-9)


def test_a_part_that_is_off_stays_zero():
    total = sums(*planted(0.12, [0.1, -0.05, 0.02], 0.07, num=5))
    none = fit(total, False, False, False)
    assert (
        float(none["slope"]) == 0
        and bias_of(none).flatten().tolist() == [0] * 3
        and float(none["variance"]) == 0
    )
    assert torch.equal(none["mse_after"], none["mse_before"])
    # without k the whole error is the residual
    plain = fit(total, False, "residual", True)
    assert_close(bias_of(plain), total[2] / total[0], 1e-12)


def test_an_error_that_shrinks_eps_is_divided_out_where_slopes_are_signed():
    total = sums(*planted(-0.3, [0.0, 0.0, 0.0], 0.01))
    found, signed = fit(total, **EVERYTHING), fit(total, **EVERYTHING | {"slope": "signed"})
    assert float(found["slope"]) == 0 and float(found["mse_after"]) <= float(found["mse_before"])
    assert float(signed["slope"]) == pytest.approx(-0.3, abs=1e-3)
    assert float(signed["mse_after"]) == pytest.approx(0.01**2 / 0.7**2, rel=0.03)
    lost = fit(sums(*planted(-0.9, [0.0, 0.0, 0.0], 0.01)), **EVERYTHING | {"slope": "signed"})
    # at most doubled: nearly all of it is lost
    assert float(lost["slope"]) == -0.5
    constant = fit(sums(torch.ones(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.5)), **EVERYTHING)
    assert bias_of(constant).flatten().tolist() == [0.5] * 3
    assert float(constant["slope"]) == float(constant["mse_after"]) == 0

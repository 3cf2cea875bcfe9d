"""The log2 grid and the choice between grids."""

import pytest
import torch
from tiny import make_job, normal, rules

from quant.grid import LOG2_TOP, log2_codes
from quant.network import modules_of
from quant.passes.run import run_passes
from quant.passes.softmax_grid import grid_error, softmax_grid
from quant.quantizer import Quantizer
from quant.reconstruction.capture import inputs_of
from quant.spec import QuantSpec
from quant.timeline import Timeline


def test_powers_of_two_are_kept_and_others_go_to_the_nearest_exponent():
    x = torch.tensor([1.0, 0.5, 0.25, 2.0**-14, 0.7, 0.72, 0.0])
    values = log2_codes(x, 4) * 2.0**-LOG2_TOP
    # sqrt(1/2) = 0.7071 divides
    assert values.tolist() == [1.0, 0.5, 0.25, 2.0**-14, 0.5, 1.0, 0.0]


def test_log2_is_idempotent_and_ends_at_zero():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 8
    for bits in (2, 3, 4, 8):
        once = log2_codes(x, bits) * 2.0**-LOG2_TOP
        assert torch.equal(log2_codes(once, bits) * 2.0**-LOG2_TOP, once)
        assert len(once.unique()) <= 2**bits
    # 2 bits: 1, 1/2, 1/4 and 0
    assert float(log2_codes(torch.tensor([2.0**-2.6]), 2)) == 0


def test_gradient_passes_straight_through():
    x = torch.tensor([0.3, 0.9], requires_grad=True)
    (log2_codes(x, 4) * 2.0**-LOG2_TOP).sum().backward()
    assert torch.allclose(x.grad, torch.ones(2))


def softmax_quantizer(bits=4):
    return Quantizer(QuantSpec(bits=bits), torch.tensor(0), Timeline())


def test_peaked_maps_take_log2_and_even_ones_the_uniform_grid():
    v, t = normal(4, 64, 8), torch.zeros(4)
    even = (normal(4, 64, 64) * 0.1).softmax(-1)
    # many small weights beside a few large ones
    peaked = normal(4, 64, 64).softmax(-1)
    for probs, best in ((even, "uniform"), (peaked, "log2")):
        errors = {
            g: grid_error(softmax_quantizer(3), g, (probs, v), 0, Timeline(), t)
            for g in ("uniform", "log2")
        }
        assert min(errors, key=lambda g: errors[g][0]) == best
        assert all(drift >= 0 for _, drift in errors.values())


def test_error_and_row_drift_of_a_map_on_the_grid_are_zero():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]])
    assert grid_error(
        softmax_quantizer(), "log2", (probs, normal(1, 3, 5)), 0, Timeline(), torch.zeros(1)
    ) == (0, 0)
    # a right operand: (keys, queries)
    swapped = probs.transpose(1, 2)
    assert grid_error(
        softmax_quantizer(), "log2", (normal(1, 5, 3), swapped), 1, Timeline(), torch.zeros(1)
    ) == (0, 0)


def test_error_and_row_drift_by_hand():
    """Rows that lose, keep and gain a quarter: drift counts both, and no row is rescaled."""
    probs = torch.tensor([[[0.7, 0.3, 0.0], [0.6, 0.4, 0.0], [0.75, 0.25, 0.0]]])
    # -log2 is 0.51, 1.74; 0.74, 1.32; 0.42, 2: on the grid (1/2, 1/4), (1/2, 1/2), (1, 1/4)
    lost = (0.2**2 + 0.05**2) + (0.1**2 + 0.1**2) + 0.25**2
    power = (0.7**2 + 0.3**2) + (0.6**2 + 0.4**2) + (0.75**2 + 0.25**2)
    wanted = pytest.approx((lost / power, (0.25 + 0 + 0.25) / 3), rel=1e-5)
    v, t = torch.eye(3)[None], torch.zeros(1)
    assert grid_error(softmax_quantizer(), "log2", (probs, v), 0, Timeline(), t) == wanted
    assert (
        grid_error(softmax_quantizer(), "log2", (v, probs.transpose(1, 2)), 1, Timeline(), t)
        == wanted
    )


def test_the_pass_adds_a_rule_for_each_log2_map(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 3))
    facts = softmax_grid(job)
    assert len(facts) == 4 and all(f["error_log2"] > 0 for f in facts)
    chosen = {f["unit"] for f in facts if f["grid"] == "log2"}
    assert chosen == {f["unit"] for f in facts if f["error_log2"] < f["error_uniform"]}
    unit, sample = facts[0]["unit"], job.calibration.spread(16, job.net.timeline, job.seed)
    operands = inputs_of(tiny_net, [unit], sample, len(sample), whole=True)[unit]
    drifts = {
        g: grid_error(softmax_quantizer(3), g, operands, 1, Timeline(), sample.t)[1]
        for g in ("uniform", "log2")
    }
    assert (
        facts[0]["row_drift"] == pytest.approx(drifts[facts[0]["grid"]])
        and drifts["log2"] != drifts["uniform"]
    )
    grids = {
        name: m.b_quantizer.spec.grid
        for name, m in modules_of(job.net).items()
        if name.endswith("av_matmul")
    }
    assert {name for name, grid in grids.items() if grid == "log2"} == chosen
    run_passes(job, ["fit_ranges"])

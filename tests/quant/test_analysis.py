"""Errors of eps, and what follows from ranges, where the answer is planted or counted by hand."""

import math

import pytest
import torch
from tiny import normal

from quant.analysis import (
    channel_imbalance,
    decide,
    describe,
    range_model,
    step_sqnr,
    temporal_variation,
)

RECORD = [
    (0, 900, normal(4, 3, 2, 2), "cond", normal(4, 3, 2, 2, seed=1)),
    (1, 100, normal(4, 3, 2, 2, seed=2), "cond", normal(4, 3, 2, 2, seed=3)),
]


def test_relative_error_in_decibels():
    exact = {float(t): eps for _, t, _, _, eps in RECORD}
    share = {900.0: 0.1, 100.0: 0.01}
    rows = step_sqnr(RECORD, lambda x, t, cond: exact[float(t[0])] * (1 + share[float(t[0])]))
    assert [(row["step"], row["t"]) for row in rows] == [(0, 900), (1, 100)]
    assert [row["sqnr_db"] for row in rows] == pytest.approx([20, 40], abs=1e-3)


def test_network_sees_the_recorded_x_and_a_step_for_each_image():
    def network(x, t, cond):
        expected = next(row for row in RECORD if row[1] == float(t[0]))
        assert (
            torch.equal(x, expected[2]) and t.shape == (4,) and (t == t[0]).all() and cond == "cond"
        )
        return torch.zeros_like(x)

    assert [row["sqnr_db"] for row in step_sqnr(RECORD, network)] == pytest.approx([0, 0], abs=1e-6)


def test_batches_of_a_step_add_up_and_a_learned_variance_does_not_count():
    whole = step_sqnr(RECORD, lambda x, t, cond: x)
    halves = [
        (step, t, x[rows], cond, torch.cat([eps[rows], 1e6 * eps[rows]], dim=1))
        for rows in (slice(0, 1), slice(1, 4))
        for step, t, x, cond, eps in RECORD
    ]
    found = step_sqnr(halves, lambda x, t, cond: torch.cat([x, 7 * x], dim=1))
    assert [(row["step"], row["t"]) for row in found] == [(0, 900), (1, 100)]
    assert [row["sqnr_db"] for row in found] == pytest.approx([row["sqnr_db"] for row in whole])


def test_no_error_is_a_large_number():
    rows = step_sqnr(RECORD[:1], lambda x, t, cond: RECORD[0][4])
    power = RECORD[0][4].double().square().sum().log10()
    assert rows[0]["sqnr_db"] == pytest.approx(10 * (float(power) + 30))


# ---- the model of ranges


def centred(num, seed):
    values = normal(num, seed=seed).double()
    return values - values.mean()


def test_rank_one_table_is_recovered():
    a, b = centred(12, 0), centred(7, 1)
    model = range_model((0.3 + a[:, None] + b).exp())
    torch.testing.assert_close(model["a"], a)
    torch.testing.assert_close(model["b"], b)
    assert model["mu"] == pytest.approx(0.3) and model["rho"] < 1e-6


def test_pure_interaction_has_no_scales_to_recover():
    a, b = centred(12, 0), centred(7, 1)
    model = range_model((a[:, None] * b).exp())
    assert (
        model["rho"] == pytest.approx(1)
        and model["a"].abs().max() < 1e-12
        and model["b"].abs().max() < 1e-12
    )


def test_residual_share_is_that_of_a_loop():
    r = normal(5, 4).abs().double() + 0.1
    log = [[math.log(float(v)) for v in row] for row in r]
    mu = sum(map(sum, log)) / 20
    rows, columns = [sum(row) / 4 for row in log], [sum(column) / 5 for column in zip(*log)]
    left = sum((log[t][c] - rows[t] - columns[c] + mu) ** 2 for t in range(5) for c in range(4))
    assert range_model(r)["rho"] == pytest.approx(
        left / sum((v - mu) ** 2 for row in log for v in row)
    )


def test_constant_table_asks_for_nothing():
    facts = describe(torch.full((9, 5), 0.37))
    assert facts == {
        "temporal_variation": pytest.approx(0, abs=1e-12),
        "channel_imbalance": 1.0,
        "rho": 0.0,
    }
    assert decide(facts) == {"segments": False, "balance": False, "by_range": False}


def test_dead_channels_count_for_nothing():
    a, b = centred(6, 0), centred(4, 1)
    alive = (a[:, None] + b).exp()
    # dying: dead at one step
    dead, dying = torch.zeros(6, 2), torch.cat([torch.zeros(1, 1), torch.ones(5, 1)])
    model = range_model(torch.cat([dead, alive, dying], dim=1))
    torch.testing.assert_close(model["b"][2:6], b)
    assert model["b"].isnan().tolist() == [True] * 2 + [False] * 4 + [True] and model["rho"] < 1e-6
    assert channel_imbalance(torch.cat([dead, alive], dim=1)) == channel_imbalance(alive)
    assert all(
        math.isnan(describe(dead)[key]) for key in ("temporal_variation", "channel_imbalance")
    )


def test_time_gain_and_channel_gain_are_told_apart():
    time_gain = torch.tensor([-0.5, 0.5, -0.5, 0.5]).exp()
    channel_gain = torch.tensor([1.0, 1, 1, 1, 10])
    facts = describe(time_gain[:, None].expand(4, 5))
    assert facts["temporal_variation"] == pytest.approx(0.5) and facts[
        "channel_imbalance"
    ] == pytest.approx(1)
    assert decide(facts) == {"segments": True, "balance": False, "by_range": False}
    facts = describe(channel_gain.expand(4, 5))
    assert facts["temporal_variation"] == pytest.approx(0) and facts[
        "channel_imbalance"
    ] == pytest.approx(10)
    assert decide(facts) == {"segments": False, "balance": True, "by_range": False}
    # the channel grows with time
    late = torch.where(torch.arange(4)[:, None] > 1, channel_gain, torch.ones(5))
    facts = describe(late)
    assert facts["temporal_variation"] == pytest.approx(math.log(10) / 10)
    assert decide(facts) == {"segments": False, "balance": True, "by_range": True}


def test_thresholds_are_the_callers():
    facts = {"temporal_variation": 0.3, "channel_imbalance": 5.0, "rho": 0.4}
    assert decide(facts) == {"segments": True, "balance": True, "by_range": True}
    assert decide(facts, segments_above=0.3, balance_above=5, by_range_above=0.4) == {
        "segments": False,
        "balance": False,
        "by_range": False,
    }


def test_variation_of_a_scale():
    assert temporal_variation(torch.tensor([0.0, 2, 0, 2])) == 1

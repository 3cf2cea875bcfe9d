"""Signal to noise of eps by step, where the noise is known."""
import pytest
import torch

from quant.analysis import step_sqnr
from tiny import normal

RECORD = [(0, 900, normal(4, 3, 2, 2), normal(4, 3, 2, 2, seed=1)), (1, 100, normal(4, 3, 2, 2, seed=2),
                                                                    normal(4, 3, 2, 2, seed=3))]


def test_relative_error_in_decibels():
    exact = {float(t): eps for _, t, _, eps in RECORD}
    share = {900.0: 0.1, 100.0: 0.01}
    rows = step_sqnr(RECORD, lambda x, t: exact[float(t[0])] * (1 + share[float(t[0])]))
    assert [(row["step"], row["t"]) for row in rows] == [(0, 900), (1, 100)]
    assert [row["sqnr_db"] for row in rows] == pytest.approx([20, 40], abs=1e-3)


def test_network_sees_the_recorded_x_and_a_step_for_each_image():
    def network(x, t):
        expected = next(row for row in RECORD if row[1] == float(t[0]))
        assert torch.equal(x, expected[2]) and t.shape == (4,) and (t == t[0]).all()
        return torch.zeros_like(x)
    assert [row["sqnr_db"] for row in step_sqnr(RECORD, network)] == pytest.approx([0, 0], abs=1e-6)


def test_no_error_is_a_large_number():
    rows = step_sqnr(RECORD[:1], lambda x, t: RECORD[0][3])
    power = RECORD[0][3].double().square().sum().log10()
    assert rows[0]["sqnr_db"] == pytest.approx(10 * (float(power) + 30))

"""AdaRound's variables: their start, their hard end, their penalty."""

import pytest
import torch
from tiny import normal

from quant.groups import weight_groups
from quant.observer import fit_scales
from quant.quantizer import Quantizer
from quant.reconstruction.rounding import Rounding
from quant.spec import QuantSpec


def start(weight, bits, *, per="channel", name="minmax", symmetric=False):
    q = Quantizer(
        QuantSpec(bits=bits, per=per, range=name, symmetric=symmetric),
        weight_groups(per, weight.shape),
    )
    fit_scales(q, [weight.flatten(1) if per == "channel" else weight.reshape(1, -1)])
    return Rounding(weight, q), q


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_soft_weight_starts_as_the_weight_itself(bits, per, symmetric):
    weight = normal(6, 4, 3, 3)
    rounding, q = start(weight, bits, per=per, symmetric=symmetric)
    scale, zero = (q.table(v, weight) for v in (q.scale, q.zero_point))
    ratio = weight / scale
    off = (rounding.h() - ratio + 0.5) % 1 - 0.5  # h is the fraction, up to a whole step
    assert off.abs().max() < 1e-4
    inside = (ratio >= q.low - zero) & (ratio <= q.high - zero)
    assert inside.float().mean() > 0.5
    clipped = ratio.clamp(q.low - zero, q.high - zero) * scale
    assert ((rounding() - clipped).abs() / scale).max() < 1e-4
    torch.testing.assert_close(
        rounding()[inside], weight[inside], rtol=0, atol=1e-4 * float(scale.max())
    )


@pytest.mark.parametrize("name", ["minmax", "mse"])
def test_hard_codes_start_at_the_nearest(name):
    weight = normal(6, 40)
    rounding, q = start(weight, 4, name=name)
    ties = (weight / q.table(q.scale, weight)).frac().abs().sub(0.5).abs() < 1e-5
    assert not ties.any() and torch.equal(rounding.codes(hard=True), q.codes(weight))


def test_hard_codes_are_integers_in_range_next_to_the_weight_whatever_was_learned():
    weight = normal(6, 40)
    rounding, q = start(weight, 3, name="mse")
    rounding.alpha.data = normal(6, 40, seed=1)
    codes, zero = rounding.codes(hard=True), q.table(q.zero_point, weight)
    assert torch.equal(codes, codes.round())
    assert (codes + zero).min() >= 0 and (codes + zero).max() <= 7
    assert (codes - q.codes(weight)).abs().max() == 1


def test_soft_and_hard_agree_once_every_h_is_zero_or_one():
    weight = normal(6, 40)
    rounding, q = start(weight, 4)
    rounding.alpha.data = 10 * normal(6, 40, seed=1).sign()
    assert set(rounding.h().unique().tolist()) == {0.0, 1.0}
    assert torch.equal(rounding.codes(hard=False), rounding.codes(hard=True))
    assert rounding.penalty(20.0) == 0 and rounding.penalty(2.0) == 0


@pytest.mark.parametrize("beta", [20.0, 7.0, 2.0])
def test_penalty_closed_form(beta):
    rounding, _ = start(normal(1, 3), 4)
    h = torch.tensor([[0.5, 0.25, 0.9]])
    rounding.alpha.data = torch.logit((h + 0.1) / 1.2)  # inverse of h = 1.2 sigmoid(alpha) - 0.1
    expected = (1 - 0.0**beta) + (1 - 0.5**beta) + (1 - 0.8**beta)
    assert float(rounding.penalty(beta).detach()) == pytest.approx(expected, rel=1e-5)

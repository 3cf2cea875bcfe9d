"""Channel-wise balancing: the product stays what it is, planted imbalance is found, and the
identity is never beaten by something worse."""

import pytest
import torch
from tiny import fit, normal
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.passes.balance import balance_group, balance_vector, channel_max, error_with
from quant.spec import QuantSpec
from quant.timeline import Timeline


def test_vector_is_smoothquants_over_its_geometric_mean():
    data, weight = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 4.0, 0.25])
    raw = data**0.3 / weight**0.7
    expected = raw / raw.log().mean().exp()
    assert torch.allclose(balance_vector(data, weight, 0.3), expected, rtol=1e-5)
    assert torch.equal(balance_vector(torch.ones(5), torch.ones(5), 0.5), torch.ones(5))


def test_dead_channels_take_no_part():
    s = balance_vector(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    # one is alive, and its geometric mean is itself
    assert s.tolist() == [1.0, 1.0, 1.0]
    assert balance_vector(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]
    small, ones = torch.tensor([5e-6, 4.0, 1.0]), torch.ones(3)
    assert balance_vector(small, ones, 1.0).tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert balance_vector(ones, small, 0.0).tolist() == pytest.approx([1.0, 0.5, 2.0])
    assert float(balance_vector(torch.tensor([2e-5, 2.0]), torch.ones(2), 1.0)[0]) == pytest.approx(
        10**-2.5
    )


@pytest.mark.parametrize(
    "data, expected",
    [
        ([1e8, 1, 1], [1e3, 10 ** (-8 / 3), 10 ** (-8 / 3)]),
        ([1e8, 1e8, 1], [10 ** (8 / 3), 10 ** (8 / 3), 1e-3]),
    ],
)
def test_vector_stays_within_a_factor_of_a_thousand(data, expected):
    assert balance_vector(torch.tensor(data), torch.ones(3), 1.0).tolist() == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("trailing, axis", [(2, 1), (1, 1), (0, 2)])
def test_channel_maximum_over_all_other_axes(trailing, axis):
    x = normal(2, 3, 4, 5) if trailing == 2 else normal(2, 3, 4)
    expected = [float(x.select(axis, c).abs().max()) for c in range(x.shape[axis])]
    assert channel_max(x, trailing).tolist() == expected


def planted(gain, in_weight):
    """64 -> 64 convolution, Gaussian; one channel larger in the data, and smaller in the weight
    with `in_weight`."""
    x, layer = normal(8, 64, 8, 8), tag("conv1", nn.Conv2d(64, 64, 3, padding=1, bias=False))
    layer.weight.data = normal(64, 64, 3, 3, seed=1)
    x[:, 5] *= gain
    if in_weight:
        layer.weight.data[:, 5] /= gain
    spec = dict(bits=4, range="mse")
    quant = QuantLayer(
        layer, QuantSpec(per="channel", **spec), QuantSpec(**spec), Timeline(), False, True
    )
    return quant.requires_grad_(False), x, layer(x).detach()


@pytest.mark.parametrize("gain", [10, 50])
def test_a_channel_large_in_the_data_and_small_in_the_weight_is_repaired(gain):
    quant, x, target = planted(gain, True)
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [0.0, 0.5, 1.0])
    assert facts["error_after"] * 10 < facts["error_before"]
    assert facts["alpha"] is not None and float(quant.inverse_balance[5]) < 0.5


@pytest.mark.parametrize("gain", [10, 50])
def test_a_channel_large_in_the_data_alone_never_ends_worse_than_the_identity(gain):
    quant, x, target = planted(gain, False)
    errors = [
        error_with(
            quant,
            balance_vector(channel_max(x, 2), quant.weight.abs().amax((0, 2, 3)), a),
            x,
            target,
            torch.zeros(8),
            Timeline(),
        )
        for a in (0.0, 0.5, 1.0)
    ]
    identity = error_with(quant, torch.ones(64), x, target, torch.zeros(8), Timeline())
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [0.0, 0.5, 1.0])
    assert facts["error_before"] == identity and facts["error_after"] == min([identity, *errors])


@pytest.mark.parametrize("gain, in_weight", [(10, True), (10, False), (50, False)])
def test_the_layer_is_left_with_the_best_vector(gain, in_weight):
    """Its error, measured anew, is the one reported."""

    def error(layer):
        return float((fit(layer, x)(x) - target).double().square().mean())

    quant, x, target = planted(gain, in_weight)
    weight_max = quant.weight.abs().amax((0, 2, 3))
    facts = balance_group(
        ["x"], [quant], x, torch.zeros(8), Timeline(), [a / 10 for a in range(11)]
    )
    assert torch.allclose(
        1 / quant.inverse_balance, balance_vector(channel_max(x, 2), weight_max, facts["alpha"])
    )
    assert error(quant) == pytest.approx(facts["error_after"], rel=1e-4)
    assert (
        error(quant)
        < error(planted(gain, in_weight)[0])
        == pytest.approx(facts["error_before"], rel=1e-4)
    )


def relative_errors(gain, in_weight):
    """Of the identity, then of alpha = 0, 0.1, ..., 1."""
    quant, x, target = planted(gain, in_weight)
    weight_max = quant.weight.abs().amax((0, 2, 3))
    vectors = [
        torch.ones(64),
        *(balance_vector(channel_max(x, 2), weight_max, a / 10) for a in range(11)),
    ]
    power = float(target.square().mean())
    return [error_with(quant, s, x, target, torch.zeros(8), Timeline()) / power for s in vectors]


@pytest.mark.parametrize("gain, without", [(10, 0.35), (50, 1.0)])
def test_the_channel_that_the_weight_makes_up_for_is_repaired_at_every_alpha(gain, without):
    """s removes the gain whatever alpha is: it is in the data's maximum as much as in the
    weight's."""
    identity, *errors = relative_errors(gain, True)
    assert identity == pytest.approx(without, rel=0.1) and errors == pytest.approx(
        [0.0245] * 11, rel=0.1
    )
    assert 10 * max(errors) < identity


def test_half_alpha_can_hurt_where_another_helps():
    """The channel dominates the output, so the identity, which quantizes it best, is hard to
    beat."""
    identity, *errors = relative_errors(50, False)
    assert errors[5] > 1.5 * identity and min(errors) < 0.95 * identity
    assert min(errors) == errors[10]


def test_a_smaller_gain_is_served_best_in_between():
    identity, *errors = relative_errors(10, False)
    assert identity == pytest.approx(0.171, rel=0.1) and min(errors) < 0.6 * identity
    assert 0 < errors.index(min(errors)) < 10


def test_balance_and_scales_of_time_segments_repair_together_what_neither_does_alone():
    """x = exp(a_t + b_c) * Gaussian, read by weights that make up for b_c: the range of (t, c) is a
    product of both."""
    t, a, b = (
        torch.tensor([100.0, 500, 900]).repeat(8),
        torch.tensor([-2.0, 0, 2]).repeat(8),
        1.5 * normal(32, seed=2),
    )
    x, errors = (a[:, None] + b).exp()[:, :, None, None] * normal(24, 32, 6, 6), {}
    for boundaries in ((), (300, 700)):
        for balanced in (False, True):
            timeline, layer = (
                Timeline(boundaries),
                tag("conv1", nn.Conv2d(32, 32, 3, padding=1, bias=False)),
            )
            layer.weight.data = normal(32, 32, 3, 3, seed=1) / b.exp()[:, None, None]
            target, spec = layer(x).detach(), dict(bits=4, range="mse")
            quant = QuantLayer(
                layer, QuantSpec(per="channel", **spec), QuantSpec(**spec), timeline, False, True
            )
            quant.requires_grad_(False)
            timeline.set_time(t)
            if balanced:
                balance_group(["x"], [quant], x, timeline.segments_of(t), timeline, [0.0, 0.5, 1.0])
                assert torch.allclose(-quant.inverse_balance.log(), b - b.mean(), atol=0.4)
            error = (fit(quant, x)(x) - target).square().mean((1, 2, 3)) / target.square().mean(
                (1, 2, 3)
            )
            errors[len(boundaries) > 0, balanced] = float(error.mean())
    together = errors.pop((True, True))
    assert together == pytest.approx(0.0245, rel=0.1) and 10 * together < min(errors.values())


def test_identity_wins_ties_and_leaves_the_layer_alone():
    quant, x, _ = planted(1, False)
    before = quant.weight.clone()
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [])
    assert facts["alpha"] is None and torch.equal(quant.weight, before)
    assert torch.equal(quant.inverse_balance, torch.ones(64))


def test_balance_behind_silu_is_exact():
    layer, norm = (
        tag("conv1", nn.Conv2d(8, 6, 3, padding=1)).requires_grad_(False),
        nn.GroupNorm(4, 8),
    )
    quant = QuantLayer(layer, QuantSpec(), QuantSpec(), Timeline(), False, True)
    quant.balance((normal(8, seed=1) * 0.5).exp())
    x = torch.nn.functional.silu(norm(normal(2, 8, 5, 5)))
    assert (quant(x) - layer(x)).abs().max() <= 1e-6

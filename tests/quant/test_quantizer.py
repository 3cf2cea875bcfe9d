"""One quantizer: grid, gradients, observed ranges, segments."""

import math

import pytest
import torch
from tiny import normal

from quant.grid import scale_zero_point
from quant.groups import activation_groups, weight_groups
from quant.observer import VALUES_PER_GROUP, Observer, fit_scales
from quant.quantizer import Quantizer
from quant.ranges import find_range
from quant.spec import QuantSpec
from quant.timeline import Timeline


def with_range(low, high, *, bits=4, symmetric=False, group_of=torch.tensor(0), timeline=None):
    """A quantizer with the given ends, (segments, groups) or fewer axes."""
    q = Quantizer(QuantSpec(bits=bits, symmetric=symmetric), group_of, timeline)
    ends = (torch.as_tensor(end, dtype=torch.float32).expand(q.scale.shape) for end in (low, high))
    q.scale.data, q.zero_point = scale_zero_point(*ends, bits, symmetric)
    return q


def observed(q, *batches, steps=None, neighbours=0, batch_size=64):
    """`q` fitted by watching the batches pass."""
    observer = Observer(q, sum(map(len, batches)))
    for i, x in enumerate(batches):
        if steps is not None:
            q.timeline.set_time(steps[i])
        observer.note(x)
    observer.fit(neighbours, batch_size)
    return q


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_projection_onto_a_grid_that_contains_zero(bits, symmetric):
    for low, high in ((-1.3, 2.9), (0.0, 0.7), (-5.1, 0.0), (-1e-3, 40.0)):
        q, x = with_range(low, high, bits=bits, symmetric=symmetric), torch.linspace(-9, 50, 997)
        once = q(x)
        assert torch.equal(q(once), once)
        codes = q.codes(x) + q.zero_point[0]
        assert torch.equal(codes, codes.round()) and codes.min() >= q.low and codes.max() <= q.high
        assert q.high - q.low == 2**bits - 1
        assert float(q(torch.zeros(1))) == 0


def test_nothing_is_further_from_its_value_than_half_a_step():
    q, x = with_range(-1.0, 2.0, bits=3), torch.linspace(-1, 2, 301)
    assert (q(x) - x).abs().max() <= q.scale / 2 * (1 + 1e-5)


@pytest.mark.parametrize(
    "per, options",
    [
        ("channel", {}),
        ("group", {"group_size": 2}),
        ("group", {"group_size": 4}),
        ("tensor", {"splits": (2, 4)}),
    ],
)
def test_groups_of_an_activation_equal_a_loop_over_lone_quantizers(per, options):
    x = normal(3, 6, 4, 4) * torch.arange(1, 7)[:, None, None]
    group_of = activation_groups(per, 6, 2, **options)
    found = observed(Quantizer(QuantSpec(bits=4, per=per), group_of), x)(x)
    for group in range(int(group_of.max()) + 1):
        part = x[:, group_of.flatten() == group]
        alone = observed(Quantizer(QuantSpec(bits=4), torch.tensor(0)), part)
        assert torch.equal(found[:, group_of.flatten() == group], alone(part))


def lsq_gradient(x, scale, zero_point, low, high):
    """Esser et al. 2020, Eq. 3, for one value: (d value / d scale, whether x is inside)."""
    if low <= x / scale + zero_point <= high:
        return round(x / scale) - x / scale, True
    return (low if x < 0 else high) - zero_point, False


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    "group_of",
    [
        torch.tensor(0),
        activation_groups("channel", 3, 1),
        activation_groups("group", 3, 1, group_size=2),
    ],
    ids=["tensor", "channel", "group"],
)
def test_gradient_of_scale_is_that_of_lsq_and_of_x_straight_through(group_of, symmetric):
    q = with_range(-0.8, 1.1, bits=3, symmetric=symmetric, group_of=group_of)
    q.scale.data *= 1 + 0.1 * torch.arange(q.scale.shape[1])
    q.scale.requires_grad_(True)
    x, weight = (normal(5, 3, 4, seed=1)).requires_grad_(True), normal(5, 3, 4, seed=2)
    (q(x) * weight).sum().backward()
    expected, index = [0.0] * q.scale.shape[1], group_of.expand(3, 4)
    inside = torch.zeros_like(x)
    for n in range(5):
        for c in range(3):
            for i in range(4):
                g, value = int(index[c, i]), float(x.detach()[n, c, i])
                scale, zero_point = float(q.scale.detach()[0, g]), int(q.zero_point[0, g])
                slope, inside[n, c, i] = lsq_gradient(value, scale, zero_point, q.low, q.high)
                expected[g] += float(weight[n, c, i]) * slope
    assert 0 < inside.mean() < 1
    torch.testing.assert_close(q.scale.grad[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, weight * inside, rtol=1e-6, atol=0)


def test_gradient_of_scale_reaches_the_segments_of_a_mixed_batch():
    timeline = Timeline([500])
    q = with_range([[-1.0], [-3.0]], [[1.0], [3.0]], timeline=timeline)
    x, gradients = normal(2, 5), []
    for rows, t in (([0, 1], [0, 900]), ([0], [0]), ([1], [900])):
        q.scale.requires_grad_(True).grad = None
        timeline.set_time(torch.tensor(t))
        q(x[rows]).sum().backward()
        gradients.append(q.scale.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1] + gradients[2])
    assert gradients[1][1] == 0 and gradients[2][0] == 0


@pytest.mark.parametrize(
    "per, size", [("tensor", {}), ("channel", {}), ("group", {"group_size": 2})]
)
@pytest.mark.parametrize("name", ["minmax", "mse", "mse2d", "percentile"])
def test_observing_few_values_equals_fitting_them_all(name, per, size):
    x = normal(6, 4, 5, 5)
    group_of, spec = (
        activation_groups(per, 4, 2, **size),
        QuantSpec(bits=4, per=per, range=name, tail=0.05),
    )
    q = observed(Quantizer(spec, group_of), x[:4], x[4:])
    groups = x.transpose(0, 1).reshape(q.scale.shape[1], -1)
    ends = torch.stack([groups.amin(1), groups.amax(1)], 1)  # both extremes are always added
    scale, zero_point = scale_zero_point(
        *find_range(name, torch.cat([groups, ends], 1), 4, False, **spec.options()), 4, False
    )
    assert torch.equal(q.scale[0], scale) and torch.equal(q.zero_point[0], zero_point)


@pytest.mark.parametrize("count", range(2, 200, 7))
def test_every_value_is_kept_once_when_there_is_room(count):
    x = torch.arange(count, dtype=torch.float32)[None]
    observer = Observer(Quantizer(QuantSpec(bits=8), torch.tensor(0)), 1)
    observer.note(x)
    assert observer.noted[0][0].flatten()[:count].tolist() == x.flatten().tolist()


def test_extremes_are_kept_however_many_values_pass():
    x = normal(4, 2, 300, 300)
    x[1, 0, 123, 45], x[3, 1, 299, 298] = 77.0, -55.0
    q = observed(Quantizer(QuantSpec(bits=8), torch.tensor(0)), x[:2], x[2:])
    assert float(q.scale) == pytest.approx((77 + 55) / 255)
    q = observed(Quantizer(QuantSpec(bits=8, per="channel"), activation_groups("channel", 2, 2)), x)
    assert q.scale[0].tolist() == pytest.approx(
        [float(c.max() - c.min()) / 255 for c in x.transpose(0, 1)]
    )


def test_percentile_of_a_subsample_is_that_of_all_values():
    """Even picks have the quantiles of the whole; the added extremes must not shift them."""
    num, size, tail = 256, 2000, 0.001
    x = torch.linspace(-1, 1, num * size)[
        torch.randperm(num * size, generator=torch.Generator().manual_seed(0))
    ]
    spec = QuantSpec(bits=8, range="percentile", tail=tail)
    q = observed(Quantizer(spec, torch.tensor(0)), *x.view(num, size).split(64))
    # standard deviation of a sample's quantile
    spread = 2 * math.sqrt(2 * tail / VALUES_PER_GROUP)
    assert float(q.scale) * 255 == pytest.approx(2 - 4 * tail, abs=5 * spread)


def test_successive_batches_are_averaged():
    q = observed(
        Quantizer(QuantSpec(bits=8, ema=0.75), torch.tensor(0)),
        *(torch.tensor([[-top, top]]) for top in (1.0, 2.0, 4.0)),
        batch_size=1,
    )
    # 0.75 (0.75 * 1 + 0.25 * 2) + 0.25 * 4
    assert float(q.scale) == pytest.approx(2 * 1.9375 / 255)
    alone = observed(
        Quantizer(QuantSpec(bits=8, ema=0.9), torch.tensor(0)), torch.tensor([[-3.0, 3.0]])
    )
    assert float(alone.scale) == pytest.approx(6 / 255)


def test_batches_that_are_averaged_are_those_of_a_segment():
    """However the samples of two segments passed: 1, 2 | 4, 8 in the one, 10, 20 | 40, 80 in the
    other."""
    q, steps = (
        Quantizer(QuantSpec(bits=8, ema=0.75), torch.tensor(0), Timeline([500])),
        torch.tensor([0.0, 999.0]),
    )
    tops = [torch.tensor([[0.0, top], [0.0, 10 * top]]) for top in (1.0, 2.0, 4.0, 8.0)]
    observed(q, *tops, steps=[steps] * 4, batch_size=2)
    assert (q.scale[:, 0] * 255).tolist() == pytest.approx(
        [0.75 * 2 + 0.25 * 8, 0.75 * 20 + 0.25 * 80]
    )


STEPS = torch.tensor([0.0, 999, 250, 250, 700, 0, 500, 999])


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_segments_are_fitted_as_static_quantizers_of_their_samples(per):
    timeline = Timeline([200, 400, 600])
    x, group_of = (
        normal(8, 3, 4, 4) * (1 + STEPS[:, None, None, None]),
        activation_groups(per, 3, 2),
    )
    q = observed(
        Quantizer(QuantSpec(bits=6, per=per), group_of, timeline),
        x[:3],
        x[3:],
        steps=[STEPS[:3], STEPS[3:]],
    )
    for t in STEPS.unique():
        alone = (
            observed(Quantizer(QuantSpec(bits=6, per=per), group_of), x[t == STEPS])
            if t < 600
            else observed(Quantizer(QuantSpec(bits=6, per=per), group_of), x[STEPS >= 600])
        )
        timeline.set_time(t[None])
        assert torch.equal(q(x), alone(x))


@pytest.mark.parametrize(
    "neighbours, steps",
    [
        (1, ([0, 250], [0, 250, 500], [250, 500, 700, 999], [500, 700, 999])),
        (2, ([0, 250, 500], None, None, [250, 500, 700, 999])),
    ],
)
def test_neighbouring_segments_lend_their_samples(neighbours, steps):
    timeline, x = Timeline([200, 400, 600]), normal(8, 3) * (1 + STEPS[:, None])
    q = observed(
        Quantizer(QuantSpec(bits=6), torch.tensor(0), timeline),
        x[:3],
        x[3:],
        steps=[STEPS[:3], STEPS[3:]],
        neighbours=neighbours,
    )
    for scale, known in zip(q.scale, steps):
        seen = x if known is None else x[torch.isin(STEPS, torch.tensor(known))]
        assert torch.equal(
            scale, observed(Quantizer(QuantSpec(bits=6), torch.tensor(0)), seen).scale[0]
        )


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_mixed_batch_equals_its_samples_one_by_one(per):
    timeline, group_of = Timeline([200, 400, 600]), activation_groups(per, 3, 2)
    q = with_range(-1.0 - torch.arange(4.0)[:, None], 2.0, group_of=group_of, timeline=timeline)
    x, together = normal(8, 3, 4, 4, seed=3), []
    timeline.set_time(STEPS)
    together = q(x)
    for i, t in enumerate(STEPS):
        timeline.set_time(t[None])
        assert torch.equal(together[i : i + 1], q(x[i : i + 1]))


def test_one_segment_is_static():
    x, timeline = normal(8, 5), Timeline()
    timeline.set_time(STEPS)
    timed = observed(Quantizer(QuantSpec(bits=4), torch.tensor(0), timeline), x, steps=[STEPS])
    assert torch.equal(timed(x), observed(Quantizer(QuantSpec(bits=4), torch.tensor(0)), x)(x))


def test_segment_without_samples_is_refused():
    with pytest.raises(ValueError, match="no sample in time segment 1 of 3"):
        observed(
            Quantizer(QuantSpec(bits=4), torch.tensor(0), Timeline([200, 600])),
            normal(2, 5),
            steps=[torch.tensor([0.0, 900.0])],
        )


def test_weight_per_channel_equals_a_loop_over_rows():
    weight = normal(5, 3, 3, 3) * torch.arange(1, 6)[:, None, None, None]
    q = Quantizer(
        QuantSpec(bits=4, per="channel", range="mse"), weight_groups("channel", weight.shape)
    )
    fit_scales(q, [weight.flatten(1)])
    for row, found in zip(weight, q(weight)):
        alone = Quantizer(QuantSpec(bits=4, range="mse"), torch.tensor(0))
        fit_scales(alone, [row.reshape(1, -1)])
        assert torch.equal(found, alone(row))

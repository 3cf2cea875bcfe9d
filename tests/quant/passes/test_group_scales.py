"""Group-wise scales over time: soft assignments, their entropy, and the choice of steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lessons import TABLE, quantizer
from tiny import SHAPE, make_job, normal, rules
from torch import nn

from base.network import tag
from quant.groups import activation_groups
from quant.layers import QuantLayer
from quant.network import input_quantizers
from quant.passes.fit_ranges import fit_ranges
from quant.passes.group_scales import GroupedScale, group_scales
from quant.passes.run import run_passes
from quant.quantizer import Quantizer
from quant.reconstruction.learn import scale_penalty
from quant.spec import QuantSpec
from quant.timeline import Timeline


def test_shares_sum_to_one_and_entropy_is_at_most_ln_of_the_groups():
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    scales, shares = soft.options()
    assert scales.shape == shares.shape == (5, 1, 3) and torch.allclose(
        shares.sum(2), torch.ones(5, 1)
    )
    assert (soft.entropy() <= math.log(3) + 1e-6).all()
    soft.logits.data.zero_()
    assert torch.allclose(soft.entropy(), torch.full((5,), math.log(3)))
    assert math.isclose(float(soft.penalty()), 0.8 * math.log(3), rel_tol=1e-5)


def test_entropy_is_added_to_the_loss_of_the_scales():
    q, free = quantizer(), quantizer()
    q.soft_scale = soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    soft.logits.data.zero_()
    assert math.isclose(
        float(scale_penalty([free, q], 0.0).detach()), 0.8 * math.log(3), rel_tol=1e-5
    )


def test_every_step_starts_with_the_nearest_group():
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    distance = (soft.log_scales.detach()[0, 0][None] - TABLE.log()).abs()
    assert torch.equal(soft.options()[1][:, 0].argmax(1), distance.argmin(1))
    assert len(soft.hard().unique()) <= 3


def test_shares_fall_with_the_distance_in_gaps_between_groups():
    # 6 groups lie 3 / 6 apart, the outermost 1 / 4 inside
    table = torch.linspace(0, 3, 6).exp()[:, None]
    logits = GroupedScale(table, 6, "timestep", 0.8).logits[:, 0]
    assert torch.allclose(logits[0], -2 * (torch.arange(6) + 0.5) ** 2, atol=1e-4)


def test_mixture_is_the_formula_and_a_decided_one_is_a_plain_quantizer():
    q, x = quantizer(), normal(6, 4)
    q.timeline.segment = 2
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    q.soft_scale = soft
    scales, shares = (part[2, 0] for part in soft.options())
    expected = sum(
        share * scale * (x / scale).round().clamp(-7, 8) for scale, share in zip(scales, shares)
    )
    assert torch.allclose(q(x), expected, atol=1e-5)
    soft.logits.data *= 1e4
    decided = q(x).detach()
    q.harden()
    assert q.soft_scale is None and torch.allclose(q(x), decided, atol=1e-6)


def test_in_the_second_half_scales_are_tuned_as_they_will_run():
    q, x = quantizer(), normal(6, 4)
    q.timeline.segment = 2
    q.soft_scale = soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    soft.done = 0.5
    found, scale = q(x), soft.log_scales[0, 0, int(soft.logits[2, 0].argmax())].exp()
    assert torch.equal(found, (x / scale).round().clamp(-7, 8) * scale)
    grads = torch.autograd.grad(
        found.square().sum() + soft.penalty(), [soft.log_scales, soft.logits]
    )
    (expected,) = torch.autograd.grad(
        (clipped(x / scale, True) * scale).square().sum(), soft.log_scales
    )
    assert torch.allclose(grads[0], expected, rtol=1e-4) and int((grads[0] != 0).sum()) == 1
    before = soft.logits.argmax(2)
    # the penalty alone only sharpens what is decided
    soft.logits.data -= grads[1]
    assert torch.equal(soft.logits.argmax(2), before)


def test_gradients_reach_assignments_and_scales_through_rounding():
    q = quantizer()
    q.soft_scale = soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    q.timeline.segment = torch.tensor([0, 2, 4])
    q(normal(3, 8)).square().sum().backward()
    assert soft.logits.grad[[0, 2, 4]].abs().sum() > 0 and soft.logits.grad[[1, 3]].abs().sum() == 0
    assert soft.log_scales.grad.abs().sum() > 0


def clipped(ratio, straight):
    """Codes -7 to 8; `straight`: with the gradient of the ratio where nothing is clipped."""
    inside = (ratio >= -7) & (ratio <= 8)
    return ratio.round().clamp(-7, 8) + (
        torch.where(inside, ratio - ratio.detach(), 0.0) if straight else 0.0
    )


def mixture(x, soft, segment, straight):
    """sum_g sigma_g s_g clip(round(x / s_g)), for the zero point 7 of 4 bits."""
    scales, shares = soft.log_scales[0, 0].exp(), soft.logits[segment, 0].softmax(0)
    return sum(share * scale * clipped(x / scale, straight) for scale, share in zip(scales, shares))


def test_gradient_of_the_lone_mixture_is_the_share_of_the_groups_it_does_not_clip():
    q, x = quantizer(), torch.tensor([0.3, -0.3, 1.9, 5.0, 9.0], requires_grad=True)
    q.timeline.segment = 2
    q.soft_scale = soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    q(x).sum().backward()
    scales, shares = (part[2, 0].tolist() for part in soft.options())
    inside = [[-7 <= value / scale <= 8 for scale in scales] for value in x.tolist()]
    assert len(set(map(tuple, inside))) > 2  # none, some and all clipped
    expected = [sum(share for share, on in zip(shares, row) if on) for row in inside]
    assert torch.allclose(x.grad, torch.tensor(expected), atol=1e-6)


def test_loss_reaches_the_first_convolutions_groups_through_the_seconds_rounding():
    """As in the formula with a straight-through estimator; without it they get exactly nothing
    (released code)."""
    torch.manual_seed(0)
    timeline, layers, softs = Timeline([1.5, 2.5, 3.5, 4.5]), [], []
    for name, shape in (("conv1", (3, 4)), ("conv2", (4, 2))):
        layer = QuantLayer(
            tag(name, nn.Conv2d(*shape, 3, padding=1)),
            QuantSpec(bits=8, per="channel"),
            QuantSpec(bits=4),
            timeline,
            False,
        ).requires_grad_(False)
        layer.fit_weight()
        layer.harden()
        layer.input_quantizer = quantizer()
        layer.input_quantizer.timeline = timeline
        softs.append(GroupedScale(TABLE, 3, "timestep", 0.8))
        layer.input_quantizer.soft_scale = softs[-1]
        layers.append(layer)
    timeline.segment, x, weights = 2, normal(2, 3, 5, 5), normal(2, 2, 5, 5, seed=1)

    def by_hand(straight):
        h = x
        for layer, soft in zip(layers, softs):
            weight = layer.weight_int * layer.weight_quantizer.scale[0].reshape(-1, 1, 1, 1)
            h = F.conv2d(mixture(h, soft, 2, straight), weight, layer.bias, padding=1)
        return h

    def gradients(out):
        return torch.autograd.grad(
            (out * weights).sum(), [s.logits for s in softs] + [s.log_scales for s in softs]
        )

    found, expected = gradients(layers[1](layers[0](x))), gradients(by_hand(True))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(found, expected))
    assert all(grad.abs().max() > 0.01 for grad in found)
    assert gradients(by_hand(False))[0].abs().max() == 0


def test_in_a_network_the_loss_reaches_the_groups_of_both_convolutions_of_every_block(
    tiny_net, tmp_path
):
    job = make_job(
        tiny_net.requires_grad_(False), tmp_path, rules(8, 4), num=12, boundaries=[300, 700]
    )
    fit_ranges(job)
    group_scales(job, groups=2)
    job.net(normal(2, *SHAPE), torch.tensor([100.0, 900.0])).square().sum().backward()
    logits = {
        name: q.soft_scale.logits.grad[[0, 2]]
        for name, q in input_quantizers(job.net).items()
        if name.split(".")[-2] in ("conv1", "conv2")
    }
    assert len(logits) == 16 and all(bool((grad != 0).all()) for grad in logits.values())


def test_channel_axis_has_groups_of_its_own_at_every_step():
    soft = GroupedScale(TABLE.expand(5, 6) * torch.arange(1, 7), 2, "channel", 0.0)
    assert soft().shape == (5, 6) and all(len(row.unique()) == 2 for row in soft())


def channel_quantizer(groups):
    """4 bits, own scales for 5 segments of time and 6 channels, and what models them."""
    q = Quantizer(
        QuantSpec(bits=4, per="channel"),
        activation_groups("channel", 6, 2),
        Timeline([1.5, 2.5, 3.5, 4.5]),
    )
    q.scale.data, q.zero_point = normal(5, 6, seed=3).exp(), torch.full((5, 6), 7.0)
    q.soft_scale = GroupedScale(q.scale.detach(), groups, "channel", 0.0)
    return q, q.soft_scale


def test_every_channel_starts_with_the_nearest_group_of_its_step():
    q, soft = channel_quantizer(3)
    for s, row in enumerate(q.scale.tolist()):
        groups = [float(np.quantile(np.log(row), (g + 0.5) / 3)) for g in range(3)]
        for c, scale in enumerate(row):
            nearest = min(range(3), key=lambda g: abs(groups[g] - math.log(scale)))
            assert int(soft.logits[s, c].argmax()) == nearest
            assert math.isclose(float(soft.hard()[s, c]), math.exp(groups[nearest]), rel_tol=1e-5)


def test_mixture_over_the_groups_of_each_channel_is_the_formula():
    (q, soft), x, segments = channel_quantizer(3), normal(3, 6, 2, 2), [4, 0, 2]
    q.timeline.segment, mixed, decided = (
        torch.tensor(segments),
        torch.empty_like(x),
        torch.empty_like(x),
    )
    for n, s in enumerate(segments):
        for c in range(6):
            scales, logits = soft.log_scales[s, 0].exp().tolist(), soft.logits[s, c].tolist()
            shares = [math.exp(a) / sum(map(math.exp, logits)) for a in logits]
            mixed[n, c] = sum(
                share * scale * clipped(x[n, c] / scale, False)
                for scale, share in zip(scales, shares)
            )
            scale = scales[shares.index(max(shares))]
            decided[n, c] = scale * clipped(x[n, c] / scale, False)
    assert torch.allclose(q(x), mixed, atol=1e-5) and not torch.allclose(mixed, decided, atol=0.1)
    soft.done = 0.5
    assert torch.allclose(q(x), decided, atol=1e-5)
    q.harden()
    assert torch.allclose(q(x), decided, atol=1e-5)


def test_the_pass_shares_few_scales_among_steps(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(32, 6), num=12, boundaries=[200, 400, 600, 800])
    run_passes(job, ["fit_ranges", {"group_scales": {"groups": 2}}])
    for q in input_quantizers(job.net).values():
        assert q.scale.shape[0] == 5 and all(len(column.unique()) <= 2 for column in q.scale.T)


def test_more_groups_than_segments(tiny_net, tmp_path):
    with pytest.raises(ValueError, match="9 groups of time segments asked for, there are 2"):
        group_scales(make_job(tiny_net, tmp_path, rules(32, 6), boundaries=[500]), groups=9)

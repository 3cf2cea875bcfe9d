"""Group-wise scales over time: soft assignments, their entropy, and the choice of steps."""
import math

import pytest
import torch

from quant.apq import GroupedScale, group_scales
from quant.convert import input_quantizers
from quant.learn import Unit, draw_rows
from quant.passes import run_passes
from quant.quantizer import Quantizer, QuantSpec
from quant.timeline import Timeline
from tiny import make_job, normal, rules

TABLE = torch.tensor([[0.1], [0.11], [0.4], [0.42], [1.0]])


def quantizer(table=TABLE, bits=4):
    q = Quantizer(QuantSpec(bits=bits), torch.tensor(0), Timeline([1.5, 2.5, 3.5, 4.5][:len(table) - 1]))
    q.scale.data, q.zero_point = table.clone(), torch.full_like(table, 7.0)
    return q


def test_shares_sum_to_one_and_entropy_is_at_most_ln_of_the_groups():
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    scales, shares = soft.options()
    assert scales.shape == shares.shape == (5, 1, 3) and torch.allclose(shares.sum(2), torch.ones(5, 1))
    assert (soft.entropy() <= math.log(3) + 1e-6).all()
    soft.logits.data.zero_()
    assert torch.allclose(soft.entropy(), torch.full((5,), math.log(3)))
    assert math.isclose(float(soft.penalty()), 0.8 * math.log(3), rel_tol=1e-5)


def test_every_step_starts_with_the_nearest_group():
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    distance = (soft.log_scales.detach()[0, 0][None] - TABLE.log()).abs()
    assert torch.equal(soft.options()[1][:, 0].argmax(1), distance.argmin(1))
    assert len(soft.hard().unique()) <= 3


def test_mixture_is_the_formula_and_a_decided_one_is_a_plain_quantizer():
    q, x = quantizer(), normal(6, 4)
    q.timeline.segment = 2
    soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    q.__dict__["soft_scale"] = soft
    scales, shares = (part[2, 0] for part in soft.options())
    expected = sum(share * scale * (x / scale).round().clamp(-7, 8) for scale, share in zip(scales, shares))
    assert torch.allclose(q(x), expected, atol=1e-5)
    soft.logits.data *= 1e4
    decided = q(x).detach()
    q.harden()
    assert q.soft_scale is None and torch.allclose(q(x), decided, atol=1e-6)


def test_gradients_reach_assignments_and_scales_through_rounding():
    q = quantizer()
    q.__dict__["soft_scale"] = soft = GroupedScale(TABLE, 3, "timestep", 0.8)
    q.timeline.segment = torch.tensor([0, 2, 4])
    q(normal(3, 8)).square().sum().backward()
    assert soft.logits.grad[[0, 2, 4]].abs().sum() > 0 and soft.logits.grad[[1, 3]].abs().sum() == 0
    assert soft.log_scales.grad.abs().sum() > 0


def test_channel_axis_has_groups_of_its_own_at_every_step():
    soft = GroupedScale(TABLE.expand(5, 6) * torch.arange(1, 7), 2, "channel", 0.0)
    assert soft().shape == (5, 6) and all(len(row.unique()) == 2 for row in soft())


def test_steps_are_visited_by_turns_when_undecided_alike_and_the_undecided_first():
    class Soft:
        def __init__(self, entropy):
            self.value = torch.tensor(entropy)

        def entropy(self):
            return self.value

    def visits(entropy, rounds, active, segments=torch.arange(3).repeat(4)):
        module = torch.nn.Module()
        module.q = quantizer(TABLE[:3])
        module.q.__dict__["soft_scale"] = Soft(entropy)
        unit = Unit("x", module, torch.device("cpu"), None, segments=segments, visits=torch.zeros(3))
        order = []
        for _ in range(rounds):
            rows = draw_rows(unit, torch.zeros(12), torch.Generator().manual_seed(0),
                             {"batch_size": 5, "active": active})
            assert len(rows) == 5 and len(unit.segments[rows].unique()) == 1
            order.append(int(unit.segments[rows][0]))
        return order, unit.visits
    order, counts = visits([0.5, 0.5, 0.5], 10, 1.5)
    assert counts.max() - counts.min() <= 1
    order, counts = visits([0.1, 0.9, 0.1], 10, 1.5)
    assert order[0] == 1 and set(order) == {0, 1, 2} and counts[1] == counts.max()
    order, counts = visits([0.1, 0.9, 0.1], 10, 1.5, torch.tensor([0, 2]).repeat(6))     # no sample in segment 1
    assert set(order) == {0, 2} and counts[1] == 0


def test_the_pass_shares_few_scales_among_steps(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(32, 6), num=12, boundaries=[200, 400, 600, 800])
    run_passes(job, ["fit_ranges", {"group_scales": {"groups": 2}}])
    for q in input_quantizers(job.net).values():
        assert q.scale.shape[0] == 5 and all(len(column.unique()) <= 2 for column in q.scale.T)


@pytest.mark.parametrize("options, sentence", [({"groups": 9}, "9 groups of time segments asked for, there are 2"),
                                               ({"axis": "row"}, "axis 'row' is unknown; choose timestep or channel")])
def test_impossible_options(tiny_net, tmp_path, options, sentence):
    job = make_job(tiny_net, tmp_path, rules(32, 6), boundaries=[500])
    with pytest.raises(ValueError, match=sentence):
        group_scales(job, **options)

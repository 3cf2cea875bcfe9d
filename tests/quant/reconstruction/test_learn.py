"""What reconstruction optimises: each term of the loss by hand."""

import math

import pytest
import torch
from lessons import lesson_of
from tiny import fit, make_job, normal, rules
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.quantizer import Quantizer
from quant.reconstruction.learn import (
    batch_loss,
    learn_rounding,
    optimise,
    rounding_penalty,
    scale_penalty,
)
from quant.reconstruction.loss import comparable, output_loss
from quant.reconstruction.rounding import Rounding
from quant.reconstruction.settings import Objective
from quant.reconstruction.unit import Unit
from quant.scales import SoftScale
from quant.spec import QuantSpec
from quant.timeline import Timeline

CPU = torch.device("cpu")


class Two(nn.Module):
    """Two layers in a row."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_inner_layers_add_their_own_error():
    plain = Two(tag("q", nn.Linear(3, 5)), tag("q", nn.Linear(5, 2))).requires_grad_(False)
    quant = Two(
        *(
            QuantLayer(layer, QuantSpec(bits=2, per="channel"), QuantSpec(), Timeline(), False)
            for layer in (plain.first, plain.second)
        )
    ).requires_grad_(False)
    for layer in (quant.first, quant.second):
        layer.fit_weight()
    x, exact, generator = normal(5, 3), normal(5, 3, seed=1), torch.Generator()
    unit = Unit("x", quant, CPU, lambda rows: None, original=plain, float_inputs=[exact])

    def found(layer_weight):
        objective = Objective(layer_weight=layer_weight)
        lesson = lesson_of(unit, [x], plain(exact), generator.manual_seed(0), objective)
        return float(batch_loss(lesson, 2.0))

    inner = outer = 0.0
    for row in torch.randint(5, (4,), generator=generator.manual_seed(0)):
        inner += float((quant.first(x[row]) - plain.first(exact[row])).square().sum()) / 4
        outer += float((quant(x[row]) - plain(exact[row])).square().sum()) / 4
    assert inner > 0 and math.isclose(found(0.8), outer + 0.8 * inner, rel_tol=1e-5)
    assert math.isclose(found(0.0), outer, rel_tol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3, 2, 2), (5, 4, 3)])  # maps; tokens
def test_saliency_weighs_the_positions_of_the_rows_that_were_drawn(shape):
    weight = normal(5, *shape[1:-1], 1).abs() if len(shape) == 3 else normal(5, 1, 2, 2).abs()
    out, target, rows = normal(*shape), normal(*shape, seed=1), torch.tensor([4, 1])
    unit = Unit("x", None, CPU, None, saliency=lambda rows, out: weight[rows])
    found = output_loss(unit, out[rows], target, rows, 2.0)
    errors = [float((weight[r] * (out[r] - target[r]).square()).sum()) for r in rows]
    # the loss sums over axis 1 and means over the rest
    positions = out[0].numel() // shape[1]
    assert math.isclose(float(found), sum(errors) / 2 / positions, rel_tol=1e-5)
    plain = output_loss(Unit("x", None, CPU, None), out[rows], target, rows, 2.0)
    unit.saliency = lambda rows, out: torch.ones_like(weight[rows])
    assert torch.equal(output_loss(unit, out[rows], target, rows, 2.0), plain)


def test_rounding_penalty_is_off_in_the_warm_up_then_sharpens():
    layer = tag("q", nn.Linear(3, 5))
    quant = QuantLayer(layer, QuantSpec(bits=2), QuantSpec(), Timeline(), False).requires_grad_(
        False
    )
    quant.fit_weight()
    quant.rounding = Rounding(quant.weight, quant.weight_quantizer)
    h, lesson = quant.rounding.h(), lesson_of(None)
    assert rounding_penalty([quant], 0.1, lesson) == 0.0
    for done, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        expected = 0.1 * float((1 - (2 * h - 1).abs() ** beta).sum())
        assert math.isclose(float(rounding_penalty([quant], done, lesson)), expected, rel_tol=1e-4)
    off = lesson_of(None, objective=Objective(round_weight=0.0))
    assert rounding_penalty([quant], 0.6, off) == 0.0


def test_rates_fall_along_a_cosine_or_stay():
    """Adam moves by its rate where the gradient does not change."""
    falling, constant = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    groups = [
        {"params": [falling], "lr": 0.1, "cosine": True},
        {"params": [constant], "lr": 0.1, "cosine": False},
    ]
    unit = Unit("x", nn.Identity(), CPU, lambda rows: None)
    lesson = lesson_of(unit, [normal(4, 3)], normal(4, 3))
    optimise(lesson, groups, 9, 2.0, lambda done: -(falling + constant).sum())
    assert torch.allclose(constant, torch.tensor(0.9)) and torch.allclose(
        falling, torch.tensor(0.5), rtol=1e-4
    )


class Noting(SoftScale):
    """One learned scale; notes how far the learning is whenever it is used."""

    def __init__(self):
        super().__init__()
        self.table, self.noted = nn.Parameter(torch.ones(1, 1)), []

    def codes(self, quantizer, x):
        self.noted.append(self.done)
        return super().codes(quantizer, x)

    def forward(self):
        return self.table


def test_soft_scales_know_what_share_of_the_steps_is_done():
    quant = QuantLayer(tag("q", nn.Linear(3, 5)), QuantSpec(), QuantSpec(bits=4), Timeline(), False)
    fit(quant.requires_grad_(False), normal(4, 3)).input_quantizer.soft_scale = soft = Noting()
    unit = Unit("x", quant, CPU, lambda rows: None)
    groups = [{"params": [soft.table], "lr": 0.1, "cosine": True}]
    optimise(lesson_of(unit, [normal(4, 3)], normal(4, 5)), groups, 4, 2.0, lambda done: 0.0)
    assert soft.noted == [0, 0.25, 0.5, 0.75]


def test_steps_are_not_chosen_while_the_rounding_is_learned():
    """Nothing there learns how undecided a step is."""
    quant = QuantLayer(tag("q", nn.Linear(3, 5)), QuantSpec(bits=2), QuantSpec(), Timeline(), False)
    quant.requires_grad_(False).fit_weight()
    unit = Unit(
        "x",
        quant,
        torch.device("cpu"),
        lambda rows: None,
        segments=torch.arange(4),
        visits=torch.zeros(4),
    )
    chosen = {"active": 1.5, "weight_iters": 3, "weight_lr": 0.1}
    learn_rounding(lesson_of(unit, [normal(4, 3)], normal(4, 5), **chosen), [quant])
    assert quant.weight_int is not None and not unit.visits.any()


def test_queries_keys_and_values_of_a_balanced_block_are_not_compared(tiny_net, tmp_path):
    """Their scales have moved: what they answer is not what the full-precision layers do."""
    names = {}
    for balanced in (False, True):
        net = make_job(tiny_net, tmp_path, [*rules(4, 4), {"balance": balanced}]).net
        names[balanced] = (
            comparable(net.get_submodule("mid.attn_1")),
            comparable(net.get_submodule("mid.block_1")),
        )
    assert names[True][1] == ["conv1", "temb_proj"]  # the block ends with conv2
    assert (
        names[False] == (["q", "k", "v"], names[True][1])
        and names[True][0] == []
        and len(names[True][1]) > 1
    )


@pytest.mark.parametrize(
    "layers, inner",
    [
        ({"conv1": "conv1", "conv2": "conv2", "shortcut": "skip"}, ["conv1", "shortcut"]),
        ({"attn1": "proj", "up": "ff", "down": "ff", "attn2": "proj"}, ["attn1", "up", "attn2"]),
        ({"qkv": "qkv", "proj": "proj"}, ["qkv"]),
    ],
)
def test_the_layer_that_ends_a_block_is_none_of_its_inner_layers(layers, inner):
    specs = QuantSpec(bits=4), QuantSpec(), Timeline(), False
    block = nn.ModuleDict(
        {name: QuantLayer(tag(role, nn.Linear(2, 2)), *specs) for name, role in layers.items()}
    )
    assert comparable(block) == inner


def test_smoothness_is_the_squared_step_of_the_logarithm():
    q = Quantizer(QuantSpec(bits=8), torch.tensor(0), Timeline([1, 2]))
    q.scale.data = torch.tensor([[1.0], [math.e], [math.e]])
    assert scale_penalty([q], 0.0) == 0
    # the logarithm of e in float32 is one only to its seven digits
    found = float(scale_penalty([q], 0.5))
    assert found == pytest.approx(0.5, rel=1e-6)

"""Joint learning, what it mixes and drops; forms of learning that a whole network goes through."""

import pytest
import torch
from lessons import lesson_of
from tiny import facts_of, fit, make_job, normal, rules
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.network import input_quantizers
from quant.passes.run import run_passes
from quant.reconstruction import learn
from quant.reconstruction.learn import learn_jointly
from quant.reconstruction.unit import DROPPED_INPUTS, Mixed, Unit, mixed
from quant.spec import QuantSpec
from quant.timeline import Timeline

CPU = torch.device("cpu")


def test_mixed_inputs_are_of_either_kind_half_and_half():
    found = Mixed(torch.zeros(10, 500), torch.ones(10, 500), torch.Generator().manual_seed(0))[
        torch.tensor([1, 4, 7])
    ]
    assert found.shape == (3, 500) and set(found.unique().tolist()) == {0.0, 1.0}
    assert abs(float(found.mean()) - DROPPED_INPUTS) < 0.05


def test_only_the_main_input_is_mixed_the_others_are_those_of_the_quantized_network():
    # features, embedding, context
    shapes, rows = [(6, 4, 8, 8), (6, 16), (6, 3, 5)], torch.tensor([5, 0, 3])
    quant, exact = ([normal(*shape, seed=seed) for shape in shapes] for seed in (0, 1))
    x, *others = (part[rows] for part in mixed(quant, exact, torch.Generator().manual_seed(0)))
    taken = x == exact[0][rows]
    assert 0.4 < float(taken.float().mean()) < 0.6 and torch.equal(
        x[~taken], quant[0][rows][~taken]
    )
    assert len(others) == 2 and all(torch.equal(a, b[rows]) for a, b in zip(others, quant[1:]))


def test_dropped_elements_are_not_quantized():
    layer = tag("q", nn.Linear(8, 8))
    quant = QuantLayer(layer, QuantSpec(), QuantSpec(bits=2), Timeline(), False).requires_grad_(
        False
    )
    fit(quant, normal(9, 8))
    x = normal(9, 8, seed=1)
    quant.input_quantizer.drop = lambda x: torch.ones_like(x)
    assert torch.allclose(quant(x), layer(x), atol=1e-5)
    quant.input_quantizer.drop = lambda x: torch.zeros_like(x)
    dropped = quant(x)
    quant.input_quantizer.drop = None
    assert torch.equal(dropped, quant(x)) and not torch.allclose(dropped, layer(x), atol=1e-2)


@pytest.mark.parametrize("drop", [0.0, 0.2, 1.0])
def test_the_share_of_dropped_elements_is_the_option(drop, monkeypatch):
    """0 quantizes all of the input, 1 none, anew in every step."""
    quant = QuantLayer(
        tag("q", nn.Linear(100, 3)), QuantSpec(), QuantSpec(bits=2), Timeline(), False
    )
    x, q, steps = normal(300, 100), quant.requires_grad_(False).input_quantizer, []
    rounded = fit(quant, x).input_quantizer(x)
    monkeypatch.setattr(learn, "optimise", lambda *_: steps.extend(q(x).detach() for _ in range(2)))
    unit = Unit("x", quant, CPU, lambda rows: None)
    generator = torch.Generator().manual_seed(0)
    lesson = lesson_of(unit, [x], quant(x), generator, drop=drop, weight_iters=1)
    learn_jointly(lesson, [], [q])
    for found in steps:
        dropped = found != rounded
        assert (
            abs(float(dropped.float().mean()) - drop) <= 4 * (drop * (1 - drop) / x.numel()) ** 0.5
        )
        assert torch.allclose(found[dropped], x[dropped], atol=1e-6)
    assert len(steps) == 2 and torch.equal(*steps) == (drop != 0.2)
    assert q.drop is None and torch.equal(q(x), rounded)


@pytest.mark.parametrize(
    "soft", [{"dynamic_scales": {"warm_steps": 3}}, {"group_scales": {"groups": 2}}]
)
def test_what_gives_the_scales_is_learned_at_a_rate_of_its_own(tiny_net, tmp_path, soft):
    def tables(name, *passes):
        job = make_job(
            tiny_net,
            tmp_path / name,
            [{"match": "mid.*", "input": {"bits": 6}}],
            num=6,
            boundaries=[500],
        )
        run_passes(job, ["fit_ranges", soft, *passes])
        return [q.scale for q in input_quantizers(job.net).values()]

    start, options = tables("start"), {"input_iters": 2, "batch_size": 4, "input_lr": 0.1}
    assert all(map(torch.equal, tables("kept", {"reconstruct": options | {"soft_lr": 0.0}}), start))
    assert not any(
        map(torch.equal, tables("learned", {"reconstruct": options | {"soft_lr": 0.05}}), start)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"joint": True, "drop": 0.5},
        {"joint": True, "layer_weight": 0.8, "round_weight": 0.0},
        {"saliency": 0.5},
        {"smooth": 0.01},
        {"gptq": True},
    ],
)
def test_every_form_lowers_the_error(tiny_net, tmp_path, options):
    job = make_job(tiny_net, tmp_path, rules(4, 6), num=12, boundaries=[500])
    counts = {"weight_iters": 30, "input_iters": 10, "batch_size": 8}
    rates = {"weight_lr": 0.02, "input_lr": 1e-3}
    passes = ["fit_ranges", {"reconstruct": counts | rates | options}]
    facts = facts_of("reconstruct", run_passes(job, passes))
    assert sum(f["error_after"] for f in facts) < sum(f["error_before"] for f in facts)
    assert all(
        q.drop is None and not q.scale.requires_grad for q in input_quantizers(job.net).values()
    )

"""The range analysis decides: static scales and balance where ranges ask for them, and nothing else
changes."""

import pytest
import torch
from tiny import EXAMPLE, facts_of, make_job, normal, quantized, rules

from quant.analysis import decide, describe, observe_ranges
from quant.network import input_quantizers, quant_layers
from quant.observer import Observer
from quant.passes.decide_by_ranges import by_segment, decide_by_ranges, quantized_points
from quant.passes.run import run_passes
from quant.quantizer import Quantizer
from quant.spec import QuantSpec
from quant.timeline import Timeline

BOUNDARIES = [250.0, 500.0, 750.0]


def test_points_are_those_of_the_range_analysis(tiny_net, tmp_path):
    net = make_job(tiny_net, tmp_path, rules(4, 4), boundaries=BOUNDARIES).net
    assert quantized_points(net).keys() == observe_ranges(tiny_net, [(0, EXAMPLE)]).keys()


def test_points_that_stay_in_floating_point_get_no_rule(tiny_net, tmp_path):
    wanted = [
        *rules(4, 4),
        {"role": "stem", "input": {"bits": 32}},
        {"role": "probs", "input": {"bits": 32}},
    ]
    found = quantized_points(make_job(tiny_net, tmp_path, wanted, boundaries=BOUNDARIES).net)
    assert found and not {"stem", "probs"} & {about["role"] for about in found.values()}


def test_every_point_gets_what_its_ranges_ask_for(tiny_net, tmp_path):
    """The decision, once more by hand from the definition, at thresholds that split the points."""
    job = make_job(
        tiny_net, tmp_path, [rules(4, 4)[0] | {"balance": True}], num=16, boundaries=BOUNDARIES
    )
    ranges = observe_ranges(tiny_net, by_segment(job, job.calibration))
    numbers = {point: describe(found.r_abs) for point, found in ranges.items()}
    limits = {
        f"{key}_above": float(torch.tensor([n[fact] for n in numbers.values()]).nanmedian())
        for key, fact in (("segments", "temporal_variation"), ("balance", "channel_imbalance"))
    }
    facts = {f["unit"]: f for f in decide_by_ranges(job, **limits)}
    assert facts.keys() == numbers.keys()
    quantizers, layers = input_quantizers(job.net), quant_layers(job.net)
    static = {name: q.spec.static for name, q in quantizers.items()}
    assert len(set(static.values())) == 2  # both kinds are there
    for point, n in numbers.items():
        wanted = decide(n, **limits)
        assert wanted.items() <= facts[point].items()
        if point in layers:
            assert static[f"{point}.input_quantizer"] is not wanted["segments"]
            assert (layers[point].inverse_balance is not None) is wanted["balance"]
            assert len(layers[point].input_quantizer.scale) == (4 if wanted["segments"] else 1)


def test_no_layer_is_balanced_that_the_rules_leave_alone(tiny_net, tmp_path):
    wanted = [rules(4, 4)[0] | {"balance": True}, {"match": "mid*", "balance": False}]
    job = make_job(tiny_net, tmp_path, wanted, num=16, boundaries=BOUNDARIES)
    decide_by_ranges(job, balance_above=0.0)
    balanced = {
        name: layer.inverse_balance is not None for name, layer in quant_layers(job.net).items()
    }
    assert all(on is not name.startswith("mid") for name, on in balanced.items())


def test_segments_are_observed_apart(tiny_net, tmp_path):
    """Each batch lies in one segment and all samples pass once."""
    job = make_job(tiny_net, tmp_path, rules(4, 4), num=16, boundaries=BOUNDARIES, max_batch=3)
    seen = [
        (s, job.net.timeline.segments_of(t), len(x))
        for s, (x, t) in by_segment(job, job.calibration)
    ]
    assert sum(n for *_, n in seen) == 16 and {s for s, *_ in seen} == {0, 1, 2, 3}
    assert all((found == s).all() and n <= 3 for s, found, n in seen)


def test_a_static_scale_is_fitted_to_all_segments():
    timeline = Timeline([500.0])
    q = Quantizer(QuantSpec(bits=8, static=True), torch.tensor(0), timeline)
    observer = Observer(q, 2)
    for t, value in ((100.0, 1.0), (900.0, 3.0)):
        timeline.set_time(torch.tensor([t]))
        observer.note(torch.full((1, 5), value))
    observer.fit()
    assert q.scale.shape == (1, 1) and float(q.scale) == pytest.approx(3 / 255)
    timeline.set_time(torch.tensor([100.0, 900.0]))  # a batch across segments
    assert torch.equal(q(torch.tensor([[3.0], [1.0]])), torch.tensor([[255.0], [85.0]]) * q.scale)


def test_without_static_points_nothing_changes(tiny_net, tmp_path):
    """Thresholds below every number: a scale of each segment and balance everywhere, as the rules
    would say it."""
    passes = [{"balance": {"num_samples": 8}}, {"fit_ranges": {}}]
    options = {"num": 16, "boundaries": BOUNDARIES}
    plain = quantized(
        tiny_net, tmp_path, [*rules(4, 4), {"balance": True}], passes=passes, **options
    )
    first = {"decide_by_ranges": {"segments_above": -1.0, "balance_above": -1.0}}
    decided = quantized(
        tiny_net, tmp_path, [*rules(4, 4), {"balance": True}], passes=[first, *passes], **options
    )
    x, t = normal(4, 3, 8, 8), torch.tensor([10.0, 300.0, 600.0, 900.0])
    assert torch.equal(plain(x, t), decided(x, t))


def test_static_scales_everywhere_are_those_of_one_segment(tiny_net, tmp_path):
    first = {"decide_by_ranges": {"segments_above": float("inf"), "balance_above": float("inf")}}
    static = quantized(
        tiny_net, tmp_path, rules(4, 4), passes=[first, {"fit_ranges": {}}], boundaries=BOUNDARIES
    )
    single = quantized(tiny_net, tmp_path, rules(4, 4))
    x, t = normal(4, 3, 8, 8), torch.tensor([10.0, 300.0, 600.0, 900.0])
    assert torch.equal(static(x, t), single(x, t))


def test_dynamic_scales_leave_static_ones_alone(tiny_net, tmp_path):
    wanted = [*rules(4, 4), {"role": "stem", "input": {"static": True}}]
    job = make_job(tiny_net, tmp_path, wanted, boundaries=BOUNDARIES)
    facts = run_passes(job, [{"fit_ranges": {}}, {"dynamic_scales": {"warm_steps": 2}}])
    learnable = sum(q.learnable for q in input_quantizers(job.net).values())
    assert facts_of("dynamic_scales", facts)[0]["inputs"] == learnable - 1


@pytest.mark.parametrize(
    "passes, boundaries, message",
    [
        ([{"decide_by_ranges": {}}], [], "set segments: per_step"),
        ([{"fit_ranges": {}}, {"decide_by_ranges": {}}], BOUNDARIES, "list it before fit_ranges"),
        (
            [{"segment_models": {"passes": [{"decide_by_ranges": {}}]}}],
            BOUNDARIES,
            "cannot be inside segment_models",
        ),
    ],
)
def test_refusals(tiny_net, tmp_path, passes, boundaries, message):
    job = make_job(tiny_net, tmp_path, rules(4, 4), boundaries=boundaries)
    with pytest.raises(ValueError, match=message):
        run_passes(job, passes)


def test_segments_with_models_of_their_own_refuse_a_shared_scale(tiny_net, tmp_path):
    wanted = [
        {
            "weight": {"bits": 4, "per": "channel", "per_segment": True},
            "input": {"bits": 4, "static": True},
        }
    ]
    job = make_job(tiny_net, tmp_path, wanted, boundaries=[500.0])
    with pytest.raises(ValueError, match="leave out static"):
        run_passes(job, [{"segment_models": {"passes": [{"fit_ranges": {}}]}}])

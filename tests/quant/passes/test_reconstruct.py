"""Block reconstruction: it helps, it continues, it repeats, and memory does not matter."""

import pytest
import torch
from tiny import capture_whole, facts_of, make_job, normal, rules
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.network import input_quantizers, quant_layers
from quant.passes.run import run_passes
from quant.reconstruction import learn
from quant.reconstruction.learn import Lesson, learn_rounding
from quant.reconstruction.loss import lp
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.unit import Mixed, Unit
from quant.spec import QuantSpec
from quant.timeline import Timeline

SHORT = dict(weight_iters=3, input_iters=3, batch_size=4)
LONG = dict(weight_iters=40, input_iters=25, batch_size=8)


def reconstructed(net, folder, wanted, options, **more):
    """-> (hardened network, facts of reconstruction)"""
    job = make_job(net, folder, wanted, **more)
    facts = run_passes(job, ["fit_ranges", {"reconstruct": options}])
    return job.net, facts_of("reconstruct", facts)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_loss_sums_over_axis_1_and_means_over_the_rest():
    a = torch.ones(2, 3, 4)
    assert float(lp(a, -a, 2)) == 3 * 4 and float(lp(a, torch.zeros(2, 3, 4), 2.4)) == 3


def test_learned_rounding_beats_nearest_on_correlated_inputs():
    mixing, weight = normal(4, 24), normal(8, 24, seed=1)
    x = normal(256, 4, seed=2) @ mixing  # 24 inputs, 4 degrees of freedom
    layer = tag("q", nn.Linear(24, 8))
    layer.weight.data = weight
    quant = QuantLayer(
        layer, QuantSpec(bits=3, per="channel"), QuantSpec(), Timeline(), False
    ).requires_grad_(False)
    quant.fit_weight()
    target = layer(x).detach()
    nearest = float((quant(x) - target).square().mean())
    unit = Unit("x", quant, torch.device("cpu"), lambda rows: None)
    schedule = Schedule(weight_lr=0.1, weight_iters=400)
    generator = torch.Generator().manual_seed(0)
    learn_rounding(Lesson(unit, [x], target, generator, Objective(), schedule), [quant])
    assert float((quant(x) - target).square().mean()) < 0.6 * nearest


def test_every_unit_ends_closer_to_its_target_at_4_bits(tiny_net, tmp_path):
    net, facts = reconstructed(
        tiny_net, tmp_path, rules(4, 4), LONG | {"weight_lr": 2e-2, "input_lr": 4e-3}, num=16
    )
    phases = {phase: [f for f in facts if f["phase"] == phase] for phase in ("weight", "input")}
    assert len(phases["weight"]) == len(phases["input"]) == 18
    for rows in phases.values():
        assert all(f["error_after"] < 1.02 * f["error_before"] for f in rows)
        assert sum(f["error_after"] for f in rows) < 0.9 * sum(f["error_before"] for f in rows)
    assert all(layer.weight_int is not None for layer in quant_layers(net).values())


def test_scales_and_rounding_are_learned_and_nothing_else(tiny_net, tmp_path):
    fitted = make_job(tiny_net, tmp_path, rules(4, 4))
    run_passes(fitted, ["fit_ranges"])
    net, _ = reconstructed(tiny_net, tmp_path, rules(4, 4), SHORT | {"weight_lr": 0.3})
    start = fitted.net.state_dict()
    changed = {
        name for name, value in net.state_dict().items() if not torch.equal(value, start[name])
    }
    assert changed and all(name.endswith(("weight_int", "quantizer.scale")) for name in changed)
    assert not any(name.endswith("weight_quantizer.scale") for name in changed)
    for name, layer in quant_layers(net).items():
        assert (layer.weight_int - quant_layers(fitted.net)[name].weight_int).abs().max() <= 1


@pytest.mark.parametrize("joint", [False, True])
def test_what_each_phase_learns_from_and_by_which_norm(tiny_net, tmp_path, monkeypatch, joint):
    """Rounding from inputs of the network quantized so far, scales from full-precision ones, both
    at once from a mix; all towards full-precision outputs."""
    job, norms = make_job(tiny_net, tmp_path, rules(4, 4)), []

    def check(lesson, groups, iters, norm, penalty):
        unit, inputs, target = lesson.unit, lesson.inputs, lesson.target
        exact, wanted = capture_whole(tiny_net, unit.name, job.calibration, 64)
        so_far, _ = capture_whole(job.net, unit.name, job.calibration, 64)
        if joint:
            assert isinstance(inputs[0], Mixed) and torch.equal(inputs[0].b, exact[0]), unit.name
            inputs = [inputs[0].a, *inputs[1:]]
        expected = exact if iters == 5 else so_far
        assert len(inputs) == len(expected) and all(map(torch.equal, inputs, expected)), unit.name
        assert torch.equal(target, wanted), unit.name
        assert unit.name != job.graph.units[-1] or not torch.equal(exact[0], so_far[0])
        norms.append((iters, norm))

    monkeypatch.setattr(learn, "optimise", check)
    run_passes(
        job, ["fit_ranges", {"reconstruct": {"weight_iters": 3, "input_iters": 5, "joint": joint}}]
    )
    assert norms == ([(3, 2.0)] if joint else [(3, 2.0), (5, 2.4)]) * 18


def test_blocks_learn_from_so_many_samples_of_every_segment(tiny_net, tmp_path, monkeypatch):
    """4 of 24 samples, and one of each segment that these leave without any."""
    job = make_job(tiny_net, tmp_path, rules(4, 8), num=24, boundaries=[300, 600])
    subset = job.calibration.subset(4, job.net.timeline, job.seed)
    seen = []

    def note(lesson, groups, iters, norm, penalty):
        lesson.unit.set_time(torch.arange(len(lesson.target)))
        seen.append(lesson.unit.segments)

    monkeypatch.setattr(learn, "optimise", note)
    options = {"weight_iters": 1, "input_iters": 1, "num_samples": 4}
    run_passes(job, ["fit_ranges", {"reconstruct": options}])
    expected = job.net.timeline.segments_of(subset.t)
    assert 4 <= len(subset) < 24 and set(expected.tolist()) == {0, 1, 2}
    assert seen and all(torch.equal(segments, expected) for segments in seen)
    assert len(job.calibration) == 24


class Killed(Exception):
    pass


@pytest.mark.parametrize("units", [1, 13])
def test_killed_run_continues_to_the_same_bytes(tiny_net, tmp_path, units):
    lines = []

    def log(line):
        lines.append(line)
        if len(lines) == units:
            raise Killed

    whole, facts = reconstructed(tiny_net, tmp_path / "whole", rules(4, 8), SHORT)
    with pytest.raises(Killed):
        reconstructed(tiny_net, tmp_path / "killed", rules(4, 8), SHORT, log=log)
    assert len(list((tmp_path / "killed").glob("*_reconstruct/*"))) == units
    continued, again = reconstructed(tiny_net, tmp_path / "killed", rules(4, 8), SHORT)
    assert same(whole, continued)
    assert [{**f, "seconds": 0} for f in facts] == [{**f, "seconds": 0} for f in again]


def test_a_unit_learned_upon_other_grids_is_learned_again(tiny_net, tmp_path):
    """As if earlier passes had chosen otherwise when the run was continued."""
    expected, _ = reconstructed(tiny_net, tmp_path / "new", rules(3, 8), SHORT)
    reconstructed(tiny_net, tmp_path / "old", rules(4, 8), SHORT)
    found, _ = reconstructed(tiny_net, tmp_path / "old", rules(3, 8), SHORT)
    assert same(expected, found)


def test_same_seed_same_bytes_and_another_seed_others(tiny_net, tmp_path):
    nets = [
        reconstructed(tiny_net, tmp_path / str(i), rules(3, 8), SHORT, seed=seed)[0]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])


@pytest.mark.parametrize("options", [{}, {"joint": True, "gptq": True}])
def test_same_seed_same_rounding_variables(tiny_net, tmp_path, monkeypatch, options):
    """Before they are rounded: alpha itself."""

    def alphas(folder, seed):
        seen = {}
        with monkeypatch.context() as patch:
            patch.setattr(
                QuantLayer,
                "harden",
                lambda layer: (
                    seen.setdefault(id(layer), layer.rounding.alpha.detach().clone())
                    if layer.rounding
                    else None,
                    harden(layer),
                )[1],
            )
            reconstructed(
                tiny_net,
                tmp_path / folder,
                rules(4, 4),
                SHORT | {"weight_iters": 6, "weight_lr": 2e-2} | options,
                seed=seed,
            )
        return list(seen.values())

    harden = QuantLayer.harden
    first, again, other = alphas("a", 0), alphas("b", 0), alphas("c", 1)
    assert len(first) == len(quant_layers(make_job(tiny_net, tmp_path, rules(4, 4)).net))
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_spilling_to_disk_changes_no_byte(tiny_net, tmp_path):
    memory, disk = (
        reconstructed(tiny_net, tmp_path / str(gb), rules(4, 8), SHORT, memory_gb=gb)[0]
        for gb in (1, 0)
    )
    assert same(memory, disk)
    assert {p.name for p in (tmp_path / "0").iterdir()} == {
        p.name for p in (tmp_path / "1").iterdir()
    }


@pytest.mark.parametrize("weight, inputs, phase", [(4, 32, "weight"), (32, 4, "input")])
def test_one_half_alone(tiny_net, tmp_path, weight, inputs, phase):
    net, facts = reconstructed(tiny_net, tmp_path, rules(weight, inputs), SHORT)
    assert {f["phase"] for f in facts} == {phase}
    assert all((layer.weight_int is None) == (weight == 32) for layer in quant_layers(net).values())
    # answered from the files
    assert same(net, reconstructed(tiny_net, tmp_path, rules(weight, inputs), SHORT)[0])


def test_no_steps_is_nearest_rounding_of_fitted_ranges(tiny_net, tmp_path):
    fitted = make_job(tiny_net, tmp_path, rules(4, 8))
    run_passes(fitted, ["fit_ranges"])
    net, facts = reconstructed(
        tiny_net, tmp_path, rules(4, 8), {"weight_iters": 0, "input_iters": 0}
    )
    assert same(net, fitted.net)


def test_float_network_and_quantizer_switches_are_left_as_they_were(tiny_net, tmp_path):
    before = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    net, _ = reconstructed(tiny_net, tmp_path, rules(4, 8), SHORT)
    assert all(torch.equal(value, before[name]) for name, value in tiny_net.state_dict().items())
    assert all(q.enabled and not q.scale.requires_grad for q in input_quantizers(net).values())


def test_scales_of_a_segment_are_learned_from_its_own_samples(tiny_net, tmp_path):
    """Samples lie on both sides of the boundary; a unit must not be run in the segment of another
    batch."""
    fitted = make_job(tiny_net, tmp_path, rules(32, 4), boundaries=[500])
    run_passes(fitted, ["fit_ranges"])
    net, facts = reconstructed(tiny_net, tmp_path, rules(32, 4), LONG, boundaries=[500])
    for name, q in input_quantizers(net).items():
        assert (q.scale != input_quantizers(fitted.net)[name].scale).any(1).all(), name
    assert sum(f["error_after"] for f in facts) < sum(f["error_before"] for f in facts)


def test_bfloat16_steps_help_too(tiny_net, tmp_path):
    _, facts = reconstructed(
        tiny_net,
        tmp_path,
        [{"match": "mid.block_1.*", "weight": {"bits": 3, "per": "channel"}}],
        LONG | {"weight_lr": 1e-2, "dtype": "bf16"},
    )
    assert [f["unit"] for f in facts] == ["mid.block_1"]
    assert facts[0]["error_after"] < facts[0]["error_before"]

"""Fine-tuning of the whole network: what it may touch, the first Adam step in closed form, and
planted damage."""

import math

import pytest
import torch
from tiny import make_job, normal, rules

from quant.network import input_quantizers, quant_layers
from quant.passes.finetune import (
    eps_error,
    errors_of,
    finetune,
    mean_objective,
    objective,
    pick_batches,
    rms_by_step,
)
from quant.passes.run import run_passes

FIT = [{"fit_ranges": {}}]
INTEGERS = ("weight_int", "zero_point")


def fitted(tiny_net, tmp_path, bits=4, **more):
    job = make_job(tiny_net.requires_grad_(False), tmp_path, rules(bits, bits), **more)
    run_passes(job, FIT)
    return job


def test_no_steps_change_nothing(tiny_net, tmp_path):
    job = fitted(tiny_net, tmp_path)
    before = {name: value.clone() for name, value in job.net.state_dict().items()}
    (fact,) = finetune(job, iters=0)
    assert fact["error_before"] == fact["error_after"] > 0
    assert all(torch.equal(value, before[name]) for name, value in job.net.state_dict().items())


def test_integers_and_the_float_network_stay_and_the_error_falls(tiny_net, tmp_path):
    job = fitted(tiny_net, tmp_path, num=32, boundaries=(300, 700))
    before = {name: value.clone() for name, value in job.net.state_dict().items()}
    original = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    (fact,) = finetune(job, iters=60, batch_size=8)
    assert fact["error_after"] < 0.95 * fact["error_before"]
    assert all(torch.equal(value, original[name]) for name, value in tiny_net.state_dict().items())
    changed = {
        name for name, value in job.net.state_dict().items() if not torch.equal(value, before[name])
    }
    assert not any(name.endswith(INTEGERS) for name in changed)
    for part in ("bias", "norm1.weight", "input_quantizer.scale", "weight_quantizer.scale"):
        assert any(name.endswith(part) for name in changed), part
    assert not any(p.requires_grad for p in job.net.parameters())


def test_first_step_is_the_rate_against_the_sign_of_the_gradient(tiny_net, tmp_path, monkeypatch):
    """Adam's first step is lr * g / |g| for every value, whatever the gradient's size."""
    errors = iter([1.0, 0.5])  # it helped: nothing is put back
    monkeypatch.setattr("quant.passes.finetune.mean_objective", lambda *_: next(errors))
    job = fitted(tiny_net, tmp_path)
    layer = quant_layers(job.net)["conv_out"]
    scale, bias = layer.weight_quantizer.scale.clone(), layer.bias.clone()
    finetune(job, iters=1, scale_lr=1e-3, bias_lr=1e-4)
    assert torch.allclose((layer.bias - bias).abs(), torch.full_like(bias, 1e-4), rtol=2e-3)
    moved = (layer.weight_quantizer.scale - scale).abs()
    assert torch.allclose(moved, torch.full_like(moved, 1e-3 * float(scale.mean())), rtol=2e-3)


def test_errors_that_add_up_along_a_stretch_cost_more_than_those_that_cancel():
    e, f = normal(48), normal(48, seed=1)
    f -= e * (e * f).sum() / e.square().sum()  # orthogonal
    e, f = (v / v.square().mean().sqrt() for v in (e, f))  # as large
    one = torch.ones(1, 2)
    for pair, cost in (
        ((e, e), (1 + 4 / 2) / 2),
        ((e, f), (1 + 2 / 2) / 2),
        ((e, -0.5 * e), (1.25 + 0.25) / 4),
    ):
        assert math.isclose(objective(torch.stack(pair)[None], one), cost, rel_tol=1e-5), cost
    both = torch.stack([torch.stack([e, e]), torch.stack([e, -e])])
    # stretches do not mix
    assert math.isclose(objective(both, torch.ones(2, 2)), (1 + 2 / 2) / 2, rel_tol=1e-5)
    level = torch.tensor([[2.0, 0.5]])  # e / 2 and 2 e add up to 2.5 e
    assert math.isclose(
        objective(torch.stack([e, e])[None], level), (4.25 / 2 + 6.25 / 2) / 2, rel_tol=1e-5
    )
    assert math.isclose(objective(e[None, None], torch.ones(1, 1)), 1, rel_tol=1e-5)


def test_level_is_the_rms_error_at_a_step_and_between_steps_that_are_looked_at():
    t = torch.tensor([900.0, 900, 500, 100, 700])  # the last one is not looked at
    batches = [torch.tensor([[0, 2]]), torch.tensor([[1, 3]])]
    planted = [torch.tensor([[1.0, 3.0]]), torch.tensor([[7.0, 0.0]])]
    level = rms_by_step(t, batches, [e[:, :, None].expand(1, 2, 3) for e in planted])
    assert torch.allclose(level, torch.tensor([25.0, 25, 9, 1e-16, 17]).sqrt())


def test_errors_are_those_of_the_samples_in_their_place(tiny_net, tmp_path):
    job, rows = fitted(tiny_net, tmp_path), torch.tensor([[3, 1], [0, 7], [2, 2]])
    found = eps_error(job, rows)
    for (i, k), row in zip([(i, k) for i in range(3) for k in range(2)], rows.flatten().tolist()):
        sample = job.calibration.arguments(slice(row, row + 1))
        assert torch.allclose(
            found[i, k], (job.net(*sample) - tiny_net(*sample)).flatten(), atol=1e-5
        )


def test_a_planted_shift_of_a_bias_is_found(tiny_net, tmp_path):
    job = fitted(tiny_net, tmp_path, bits=8, num=32)
    batches = pick_batches(job.calibration.stretches(8), 1, 0)
    layer = quant_layers(job.net)["conv_out"]
    level = rms_by_step(job.calibration.t, batches, errors_of(job, batches))
    layer.bias = torch.nn.Parameter(layer.bias + 0.05, requires_grad=False)
    assert mean_objective(errors_of(job, batches), batches, level) > 2
    finetune(job, iters=200, bias_lr=2e-3, batch_size=16)
    assert (layer.bias - tiny_net.conv_out.bias).abs().max() < 0.02
    assert mean_objective(errors_of(job, batches), batches, level) < 1.5


@pytest.mark.parametrize("rate", [10.0, float("nan")])
def test_what_does_not_help_is_put_back(rate, tiny_net, tmp_path):
    job = fitted(tiny_net, tmp_path, bits=8)
    before = {name: value.clone() for name, value in job.net.state_dict().items()}
    (fact,) = finetune(job, iters=2, scale_lr=rate, bias_lr=rate)
    assert fact["error_after"] == fact["error_before"]
    assert all(torch.equal(value, before[name]) for name, value in job.net.state_dict().items())


def test_same_seed_same_result_and_fixed_grids_keep_their_scale(tiny_net, tmp_path):
    wanted = rules(4, 4) + [{"kind": "matmul", "role": "probs", "input": {"grid": "log2"}}]
    nets = []
    for _ in range(2):
        job = make_job(tiny_net.requires_grad_(False), tmp_path, wanted)
        run_passes(job, [*FIT, {"finetune": {"iters": 3}}])
        nets.append(job.net)
    first, second = (net.state_dict() for net in nets)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    log2 = [q for q in input_quantizers(nets[0]).values() if q.spec.grid == "log2"]
    assert log2 and all(float(q.scale) == 2.0**-14 for q in log2)


def test_a_killed_run_goes_on_where_it_was_saved(tiny_net, tmp_path):
    class Killed(Exception):
        pass

    def die(line):
        lines.append(line)
        raise Killed

    options, states, lines = dict(iters=60, batch_size=2), [], []
    for folder in ("whole", "killed"):
        job = fitted(tiny_net, tmp_path / folder)
        if folder == "killed":
            job.log = die
            with pytest.raises(Killed):
                finetune(job, **options)
            assert "step 50 of 60" in lines[0]
            job = fitted(tiny_net, tmp_path / folder)
        finetune(job, **options)
        states.append(job.net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_second_pass_begins_anew(tiny_net, tmp_path):
    """Not with the state that the first one left, though each measures its objective from its own
    beginning."""
    job = fitted(tiny_net, tmp_path, num=32)
    (first,), kept = (
        finetune(job, iters=20, batch_size=8),
        quant_layers(job.net)["conv_out"].bias.clone(),
    )
    (second,) = finetune(job, iters=60, batch_size=8)
    assert (
        second["error_after"] < second["error_before"]
        and first["error_after"] < first["error_before"]
    )
    assert not torch.equal(quant_layers(job.net)["conv_out"].bias, kept)


def test_scales_of_groups_stay_what_the_groups_gave(tiny_net, tmp_path):
    job = make_job(
        tiny_net.requires_grad_(False),
        tmp_path,
        rules(4, 4),
        num=20,
        boundaries=[200, 400, 600, 800],
    )
    run_passes(job, [*FIT, {"group_scales": {"groups": 2}}, {"finetune": {"iters": 5}}])
    for q in input_quantizers(job.net).values():
        assert all(len(column.unique()) <= 2 for column in q.scale.T)


def test_what_cannot_be_fine_tuned(tiny_net, tmp_path):
    with pytest.raises(ValueError, match="list it after fit_ranges"):
        finetune(make_job(tiny_net.requires_grad_(False), tmp_path, rules(4, 4)))
    own = rules(4, 4)
    own[0]["weight"]["per_segment"] = True
    job = make_job(tiny_net, tmp_path, own, boundaries=[500])
    with pytest.raises(
        ValueError, match="finetune cannot be inside segment_models: .* leave it out"
    ):
        run_passes(job, [{"segment_models": {"passes": [*FIT, "finetune"]}}])
    with pytest.raises(ValueError, match="own weights for every time segment"):
        run_passes(job, [{"segment_models": {"passes": FIT}}, "finetune"])

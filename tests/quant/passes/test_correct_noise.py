"""Correction of eps: planted errors are found, the identity changes no bit, files keep it, images
are drawn with it."""

import json
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY, assert_close
from PIL import Image
from tiny import SHAPE, make_job, normal, rules

from base.files import PROJECT, load_tensors, save_tensors
from ddim.sampler import SAMPLERS
from models.condition import by_class
from models.diffusion import DiffusionModel
from models.sampling import Sampling, sample, trajectory
from models.zoo import build_network
from quant.analysis import step_sqnr
from quant.checkpoint import load_quantized, save_quantized
from quant.network import Correction, quant_layers
from quant.passes.correct_noise import SUMMED, correct_noise, fit, sums
from quant.passes.fit_ranges import fit_ranges
from tinydm.run_folder import open_run
from tinydm.stages import calibrate, evaluate, quantize
from tinydm.stages.sample import draw, model_of

torch.set_num_threads(1)
TIMES = torch.tensor([0.0, 10.0, 30.0, 100.0])
STEPS = {"steps": 4, "skip": "uniform", "sampler": "ddim", "eta": 1.0}
EVERYTHING = {"slope": True, "bias": "residual", "variance": True}


def filled(times=TIMES, *size):
    """A correction of random tables."""
    correction = Correction(times, 3, *size)
    for i, table in enumerate(
        (correction.slope, correction.rows, correction.columns, correction.variance)
    ):
        table.copy_(0.1 * normal(*table.shape, seed=i).abs())
    return correction


def bias_of(tables):
    """b (C, H, W) of the tables of one time."""
    return tables["rows"] + tables["columns"]


# ----------------------------------------------------------------------------------------------------------
# the tables
@pytest.mark.parametrize("num_channels", [3, 6])
def test_zero_tables_are_the_identity_bit_for_bit(num_channels):
    answer = normal(4, num_channels, 2, 2)
    answer[0, 0] = -0.0
    found = Correction(TIMES, 3, 2, 2).eps(answer, TIMES)
    assert torch.equal(found, answer) and torch.equal(found.signbit(), answer.signbit())


def test_every_image_is_corrected_at_its_own_time():
    correction, answer = filled(TIMES, 4, 5), normal(3, 6, 4, 5)
    found = correction.eps(answer, torch.tensor([30.0, 0.0, 100.0]))
    for image, i in enumerate((2, 0, 3)):
        for c, h, w in np.ndindex(3, 4, 5):
            b = correction.rows[i, c, h, 0] + correction.columns[i, c, 0, w]
            assert torch.equal(
                found[image, c, h, w], (answer[image, c, h, w] - b) / (1 + correction.slope[i])
            )
    # a learned variance is left alone
    assert torch.equal(found[:, 3:], answer[:, 3:])


def test_a_time_without_statistics_snaps_to_a_near_one_or_is_refused():
    correction = filled()
    assert correction.entries(torch.tensor([0, 4.9, 5.0, 15, 21, 66, 110, 135])).tolist() == [
        0,
        0,
        0,
        1,
        2,
        3,
        3,
        3,
    ]
    # 30 reaches as far up as down, half way to 10
    for t in (-6.0, 40.5, 135.5):
        with pytest.raises(
            ValueError, match=f"no statistics for time {t:g} .it has 4 times from 0 to 100.; sample"
        ):
            correction.eps(normal(2, 3, 2, 2), torch.tensor([0.0, t]))
    lone = filled(torch.tensor([500.0]))
    assert lone.noise_variance(500) == float(lone.variance[0])
    with pytest.raises(ValueError, match="for time 501 "):
        lone.noise_variance(501)


# ------------------------------------------------------------------------------------------------------
# the statistics
def planted(k, bias, deviation, num=200):
    """eps e and its error d = k e + bias_c + noise."""
    e = normal(num, 3, 8, 8, seed=1) + torch.tensor([0.5, 0.0, -0.5])[:, None, None]
    return e, k * e + torch.tensor(bias)[:, None, None] + deviation * normal(num, 3, 8, 8, seed=2)


def test_running_sums_equal_those_of_the_whole():
    e, d = planted(0.1, [0.1, -0.2, 0.3], 0.05, num=10)
    whole = sums(e, d)
    assert_close(sum(sums(a, b) for a, b in zip(e.split(3), d.split(3))), whole, 1e-14)
    assert_close(sums(e, d, SUMMED["line"]).sum((2, 3), keepdim=True), whole, 1e-13)
    for c in range(3):
        a, b = e[:, c].double(), d[:, c].double()
        expected = torch.stack(
            [torch.tensor(640.0), a.sum(), b.sum(), (a * b).sum(), (a * a).sum(), (b * b).sum()]
        )
        assert_close(whole[:, c].flatten(), expected, 1e-12)


def test_planted_slope_bias_and_variance_are_found():
    k, bias, deviation = 0.12, [0.1, -0.05, 0.02], 0.07
    # One regression for all channels sees the biases along with the channels' own means: plant
    # means that do not agree.
    e, d = planted(k, bias, deviation)
    e, d = e - e.mean((0, 2, 3), keepdim=True), d - k * e.mean((0, 2, 3), keepdim=True)
    found = fit(sums(e, d), **EVERYTHING)
    # 5 standard deviations: 5 * 0.07 / sqrt(38400)
    assert float(found["slope"]) == pytest.approx(k, abs=2e-3)
    assert bias_of(found).flatten().tolist() == pytest.approx(bias, abs=4e-3)
    assert float(found["variance"]) == pytest.approx((deviation / (1 + k)) ** 2, rel=0.04)
    assert float(found["mse_before"]) == pytest.approx(float(d.double().square().mean()))


def test_closed_form_equals_the_definition():
    e, d = (a.double() for a in planted(0.12, [0.1, -0.05, 0.02], 0.07, num=5))
    k = np.polyfit(e.flatten().numpy(), d.flatten().numpy(), 1)[0]
    r, total = d - k * e, fit(sums(e, d), True, "total", True)
    found = fit(sums(e, d), **EVERYTHING)
    assert float(found["slope"]) == pytest.approx(k, rel=1e-9)
    assert_close(bias_of(found).flatten(), r.mean((0, 2, 3)), 1e-9)
    assert_close(found["variance"], r.var((0, 2, 3), correction=0).mean() / (1 + k) ** 2, 1e-9)
    assert_close(bias_of(total).flatten(), d.mean((0, 2, 3)), 1e-9)
    assert torch.equal(total["variance"], found["variance"])
    for tables in (found, total):
        corrected = (e + d - bias_of(tables)) / (1 + k)
        assert_close(tables["mse_after"], (corrected - e).square().mean(), 1e-9)


def test_a_bias_per_line_is_the_nearest_sum_of_rows_and_columns():
    """Least squares of the residuals over the lines of every channel, as a general solver has
    them."""
    e, d = (a.double() for a in planted(-0.2, [0.0, 0.0, 0.0], 0.07, num=50))
    # a map, the same in all images
    d += normal(3, 8, 8, seed=3).double()
    k = np.polyfit(e.flatten().numpy(), d.flatten().numpy(), 1)[0]
    r, found = d - k * e, fit(sums(e, d, SUMMED["line"]), "signed", "residual", True)
    assert float(found["slope"]) == pytest.approx(k, rel=1e-9) and k < -0.1
    lines = torch.zeros(8, 8, 16, dtype=torch.float64)
    lines[range(8), :, range(8)] = 1
    lines[:, range(8), range(8, 16)] = 1
    lines = lines.reshape(64, 16)
    for c in range(3):
        wanted = lines @ np.linalg.lstsq(lines, r[:, c].mean(0).flatten(), rcond=None)[0]
        assert_close(bias_of(found)[c].flatten(), wanted, 1e-9)
    assert_close(found["variance"], r.var(0, correction=0).mean() / (1 + k) ** 2, 1e-9)
    assert_close(found["mse_after"], ((e + d - bias_of(found)) / (1 + k) - e).square().mean(), 1e-9)


def test_a_part_that_is_off_stays_zero():
    total = sums(*planted(0.12, [0.1, -0.05, 0.02], 0.07, num=5))
    none = fit(total, False, False, False)
    assert (
        float(none["slope"]) == 0
        and bias_of(none).flatten().tolist() == [0] * 3
        and float(none["variance"]) == 0
    )
    assert torch.equal(none["mse_after"], none["mse_before"])
    # without k the whole error is the residual
    plain = fit(total, False, "residual", True)
    assert_close(bias_of(plain), total[2] / total[0], 1e-12)


def test_an_error_that_shrinks_eps_is_divided_out_where_slopes_are_signed():
    total = sums(*planted(-0.3, [0.0, 0.0, 0.0], 0.01))
    found, signed = fit(total, **EVERYTHING), fit(total, **EVERYTHING | {"slope": "signed"})
    assert float(found["slope"]) == 0 and float(found["mse_after"]) <= float(found["mse_before"])
    assert float(signed["slope"]) == pytest.approx(-0.3, abs=1e-3)
    assert float(signed["mse_after"]) == pytest.approx(0.01**2 / 0.7**2, rel=0.03)
    lost = fit(sums(*planted(-0.9, [0.0, 0.0, 0.0], 0.01)), **EVERYTHING | {"slope": "signed"})
    # at most doubled: nearly all of it is lost
    assert float(lost["slope"]) == -0.5
    constant = fit(sums(torch.ones(2, 3, 2, 2), torch.full((2, 3, 2, 2), 0.5)), **EVERYTHING)
    assert bias_of(constant).flatten().tolist() == [0.5] * 3
    assert float(constant["slope"]) == float(constant["mse_after"]) == 0


# ------------------------------------------------------------------------------------------------------------
# the pass
class Planted:
    """A model whose quantized eps is 1.2 eps + 0.01 t."""

    shape = SHAPE

    def with_net(self, net):
        return SimpleNamespace(
            eps=lambda x, t, cond: 1.2 * exact(x, t, cond) + 0.01 * t[:, None, None, None]
        )


def exact(x, t, cond):
    # eps, then what the pass must not look at
    return torch.cat([x + cond[:, None, None, None], 7 * x], dim=1)


def visited(num_images, seed):
    for start in range(0, num_images, 3):
        cond = torch.arange(start, min(start + 3, num_images)).float()
        # a time may be visited twice
        for step, t in enumerate((750, 500, 500, 0)):
            x = normal(len(cond), *SHAPE, seed=seed + 10 * start + step)
            yield step, t, x, cond, exact(x, None, cond)


def test_the_pass_finds_a_planted_error_at_every_time(tiny_net, tmp_path):
    said, job = [], make_job(tiny_net, tmp_path, rules(8, 8), trajectory=visited)
    job.model, job.log = Planted(), said.append
    fit_ranges(job)
    facts = correct_noise(job, num_images=8, seed=3)
    assert [f["t"] for f in facts] == [0, 500, 750] and job.net.correction.times.tolist() == [
        0,
        500,
        750,
    ]
    assert job.net.correction.slope.tolist() == pytest.approx([0.2] * 3)
    assert_close(
        job.net.correction.rows,
        torch.tensor([0.0, 5, 7.5])[:, None, None, None].expand(3, 3, 1, 1),
        1e-5,
    )
    assert job.net.correction.variance.max() < 1e-6 and all(
        f["mse_after"] < 1e-6 < f["mse_before"] for f in facts
    )
    assert [f["bias"] for f in facts] == pytest.approx([0, 5, 7.5], abs=1e-5)
    assert said == [f"correct_noise: image {n} of 8" for n in (3, 6, 8)]
    assert all(layer.weight_int is not None for layer in quant_layers(job.net).values())


def test_it_needs_images(tiny_net, tmp_path):
    with pytest.raises(ValueError, match="cannot measure on 0 images"):
        correct_noise(make_job(tiny_net, tmp_path, rules(8, 8)), num_images=0)


@pytest.fixture(params=[{}, {"slope": "signed", "per": "line", "variance": False}])
def corrected(request, tiny_model, tmp_path):
    """A job on the tiny model after the pass, and its facts."""
    sampling = Sampling(**STEPS, batch_size=3)
    job = make_job(
        tiny_model.net, tmp_path, rules(3, 4), trajectory=partial(trajectory, tiny_model, sampling)
    )
    job.model = tiny_model
    fit_ranges(job)
    job.correct = partial(correct_noise, job, num_images=8, seed=5, **request.param)
    return job, job.correct()


def test_eps_comes_closer_to_the_full_precision_networks(corrected):
    job, facts = corrected
    assert [f["t"] for f in facts] == [0, 250, 500, 750]
    # else what is left grows
    assert all(f["mse_after"] < f["mse_before"] for f in facts if f["slope"] >= 0)
    # the same images again, in one batch
    record, model = [], job.model.with_net(job.net)
    sample(
        job.model,
        range(8),
        Sampling(**STEPS, seed=5, batch_size=8),
        callback=lambda step, t, x, eps, *_: record.append((step, t, x, None, eps)),
    )
    for fact, (_, t, x, _, eps) in zip(facts, reversed(record)):
        times = torch.full((8,), float(t))
        left = model.eps(x, times) - eps
        assert float(left.square().mean()) == pytest.approx(fact["mse_after"], rel=1e-3)
        assert float(left.mean((0, 2, 3)).abs().max()) < 1e-5
        assert float((job.net(x, times) - eps).square().mean()) == pytest.approx(
            fact["mse_before"], rel=1e-3
        )
    rows = step_sqnr(record, model.eps)
    for row, fact, (*_, eps) in zip(rows, reversed(facts), record):
        assert row["sqnr_db"] == pytest.approx(
            10 * math.log10(eps.square().mean() / fact["mse_after"]), abs=0.01
        )


def test_a_second_pass_measures_anew(corrected):
    job, facts = corrected
    assert job.correct() == facts


def test_trajectories_are_those_of_the_sampler_in_batches(tiny_model):
    rows = list(trajectory(tiny_model, Sampling(**STEPS, batch_size=3), 7, 5))
    assert [(step, t) for step, t, *_ in rows] == 3 * [(0, 750), (1, 500), (2, 250), (3, 0)]
    assert [len(x) for _, _, x, _, _ in rows] == [3] * 8 + [1] * 4 and all(
        cond is None for *_, cond, _ in rows
    )
    seen = []
    sample(
        tiny_model,
        [6],
        Sampling(**STEPS, seed=5, batch_size=1),
        callback=lambda step, t, x, eps, *_: seen.append((x, eps)),
    )
    for (_, _, x, _, eps), (x_alone, eps_alone) in zip(rows[8:], seen, strict=True):
        assert torch.equal(x, x_alone) and torch.equal(eps, eps_alone)


# -----------------------------------------------------------------------------------------------
# models and their files
def test_guidance_comes_first(tiny_model):
    """e_null + 3 (e_cond - e_null) = 3 cond x, then the correction."""

    class Net(torch.nn.Module):
        def forward(self, x, t, cond):
            return x * cond[:, None, None, None]

    net, x, t, cond = Net(), normal(2, *SHAPE), torch.tensor([10.0, 100.0]), torch.tensor([1, 2])
    net.register_buffer("weight", torch.zeros(1))
    net.correction = filled()
    guided = DiffusionModel(
        "tiny",
        net,
        tiny_model.schedule,
        SHAPE,
        "",
        guidance=3.0,
        condition=by_class(3, torch.tensor, null=0),
    )
    assert_close(
        guided.eps(x, t, cond), net.correction.eps(3 * cond[:, None, None, None] * x, t), 1e-6
    )


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_zero_tables_leave_the_bytes_of_every_sampler(sampler, tiny_model):
    how = Sampling(
        sampler=sampler,
        steps=5,
        skip="time_uniform" if sampler.startswith("dpm_") else "uniform",
        eta=0.7 if sampler in ("ddim", "ddpm") else 0.0,
        batch_size=3,
    )
    images = sample(tiny_model, range(3), how)
    tiny_model.net.correction = Correction(torch.arange(1000), 3)
    assert torch.equal(sample(tiny_model, range(3), how), images)
    tiny_model.net.correction.rows += 0.5
    assert not torch.equal(sample(tiny_model, range(3), how), images)


def test_only_a_sampler_with_noise_of_its_own_adds_less(tiny_model):
    how = {eta: Sampling(steps=5, skip="uniform", eta=eta, batch_size=3) for eta in (0.0, 1.0)}
    images = {eta: sample(tiny_model, range(3), how[eta]) for eta in how}
    tiny_model.net.correction = Correction(torch.arange(0, 1000, 200), 3)
    tiny_model.net.correction.variance += 0.05
    assert torch.equal(sample(tiny_model, range(3), how[0.0]), images[0.0])
    assert not torch.equal(sample(tiny_model, range(3), how[1.0]), images[1.0])


def test_the_file_keeps_the_correction_and_the_bytes(corrected, tmp_path):
    job, _ = corrected
    recipe = {
        "name": "tiny",
        "network": TINY,
        "rules": rules(3, 4),
        "weights_hash": job.model.weights_hash,
    }
    save_quantized(tmp_path / "q.safetensors", job.net, recipe)
    tensors, meta = load_tensors(tmp_path / "q.safetensors")
    assert {name for name in tensors if name.startswith("correction.")} == {
        "correction.times",
        "correction.slope",
        "correction.rows",
        "correction.columns",
        "correction.variance",
    }
    before, after = (
        job.model.with_net(net)
        for net in (job.net, load_quantized(tmp_path / "q.safetensors", build_network))
    )
    sampling = Sampling(**STEPS, seed=1, batch_size=3)
    assert torch.equal(*(sample(m, range(3), sampling) for m in (before, after)))
    del tensors["correction.slope"]
    save_tensors(tmp_path / "cut.safetensors", tensors, meta)
    with pytest.raises(
        ValueError, match="does not fit its own recipe .1 tensors, first correction.slope"
    ):
        load_quantized(tmp_path / "cut.safetensors", build_network)
    flat = tensors | {
        "correction.slope": job.net.correction.slope,
        "correction.rows": job.net.correction.times,
    }
    save_tensors(tmp_path / "flat.safetensors", flat, meta)
    with pytest.raises(
        ValueError, match="does not fit its own recipe .. tensors, first correction.rows"
    ):
        load_quantized(tmp_path / "flat.safetensors", build_network)
    job.net.correction = None
    save_quantized(tmp_path / "without.safetensors", job.net, recipe)
    assert load_quantized(tmp_path / "without.safetensors", build_network).correction is None


# -----------------------------------------------------------------------------------------------------------
# all stages
def test_from_the_method_yaml_to_images(tiny_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    configs = [
        PROJECT / "configs" / name
        for name in ("bits/w4a8.yaml", "method/ptqd.yaml", "preset/demo.yaml")
    ]
    calibrate.run(
        [
            str(tmp_path / "tiny.yaml"),
            *map(str, configs),
            "sampling.steps=4",
            "sampling.eta=1.0",
            "sampling.num=6",
            "sampling.batch_size=4",
            "calibration.steps=4",
            "calibration.images=6",
            "effort.weight_iters=4",
            "effort.input_iters=2",
            "evaluation.sqnr_images=2",
            "device=cpu",
            f"out={tmp_path}/run",
        ]
    )
    quantize.run([f"{tmp_path}/run"])
    run = open_run(tmp_path / "run")
    facts = [json.loads(line) for line in (tmp_path / "run/passes.jsonl").read_text().splitlines()]
    facts = [fact for fact in facts if fact["pass"] == "correct_noise"]
    assert [fact["t"] for fact in facts] == [0, 250, 500, 750]
    assert all(fact["mse_after"] < fact["mse_before"] for fact in facts)
    draw(run)
    images = sample(model_of(run, "simulated"), range(4), run.config.sampling)
    assert (
        np.array(Image.open(tmp_path / "run/samples/000003.png"))
        == images[3].permute(1, 2, 0).numpy()
    ).all()
    with_it = evaluate.sqnr(run)
    tensors, meta = load_tensors(tmp_path / "run/quantized.safetensors")
    save_tensors(
        tmp_path / "run/quantized.safetensors",
        {name: t for name, t in tensors.items() if not name.startswith("correction.")},
        meta,
    )
    assert [row["sqnr_db"] for row in with_it] != [row["sqnr_db"] for row in evaluate.sqnr(run)]

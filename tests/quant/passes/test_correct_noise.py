"""The pass that corrects eps: planted errors are found along full-precision trajectories."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close
from corrections import STEPS
from tiny import SHAPE, make_job, normal, rules

from models.sampling import Sampling, sample, trajectory
from quant.analysis import step_sqnr
from quant.network import quant_layers
from quant.passes.correct_noise import correct_noise
from quant.passes.fit_ranges import fit_ranges

torch.set_num_threads(1)


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

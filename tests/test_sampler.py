"""Samplers retrace the recorded trajectories; noise belongs to images, not to batches."""
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close, below, read_fixture
from ddim.sampler import SAMPLERS, SeededNoise, ddim, ddpm
from ddim.schedule import make_schedule, step_sequence

META, _, TENSORS = read_fixture("sampler_pixel")


def recorded_eps(x, t):
    """The small fixed network with which the trajectories were recorded."""
    w = below("model/", TENSORS)
    phase = 2 * math.pi * t / 1000
    features = torch.stack([phase.sin(), phase.cos(), t / 1000], dim=1)
    h = F.conv2d(x, w["w1"], w["b1"], padding=1) + (features @ w["e"].T)[:, :, None, None]
    out = F.conv2d(F.silu(h), w["w2"], w["b2"], padding=1)
    s = (t / 1000)[:, None, None, None]
    return (META["config"]["noise_model"]["k"] - s) * out + (math.pi / 2 * s).sin() * x


@pytest.mark.parametrize("name", META["config"]["runs"])
def test_recorded_trajectory(name):
    run, recorded = META["config"]["runs"][name], below(f"{name}/", TENSORS)
    sampler = {"ddim": ddim, "ddpm_noisy": ddpm}[run["kind"]]
    schedule = make_schedule(kind=META["config"]["betas"]["kind"])
    noises, seen = iter(recorded["noise"]), []
    x = sampler(recorded_eps, recorded["x"][0], step_sequence(run["skip"], run["steps"], schedule), schedule,
                noise=lambda: next(noises), eta=run.get("eta", 1.0), callback=lambda *facts: seen.append(facts))
    assert [facts[0] for facts in seen] == list(range(len(recorded["t"])))
    assert [facts[1] for facts in seen] == recorded["t"].tolist()
    for state, expected in zip([facts[2] for facts in seen] + [x], recorded["x"], strict=True):
        assert_close(state, expected, META["tolerance"])
    for facts, expected in zip(seen, recorded["pred_x0"], strict=True):
        assert_close(facts[4], expected, META["tolerance"])


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_exact_noise_leads_back_to_the_image(sampler):
    # For a single image x0 the best eps is known: (x - sqrt(a) x0) / sqrt(1 - a). Any sampler then ends at x0.
    schedule, x0 = make_schedule(), torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2)

    def eps(x, t):
        level = schedule.level(int(t[0]))
        return (x - level ** 0.5 * x0) / (1 - level) ** 0.5
    noise = SeededNoise(0, [0], x0.shape[1:])
    x = sampler(eps, noise.draw(), step_sequence("uniform", 20, schedule), schedule, noise=noise.draw)
    assert_close(x, x0, 1e-4)


def test_repeated_steps_are_harmless():
    schedule = make_schedule()
    steps = step_sequence("quad", 100, schedule)
    assert steps[:5] == [0, 0, 0, 0, 1]
    for sampler in SAMPLERS.values():
        noise = SeededNoise(0, [0], (3, 2, 2))
        x = sampler(lambda x, t: 0.1 * x, noise.draw(), steps, schedule, noise=noise.draw, eta=1.0)
        assert torch.isfinite(x).all()


def test_noise_of_an_image_is_independent_of_the_batch():
    whole, part = SeededNoise(7, range(5), (3, 2, 2)), SeededNoise(7, [3, 1], (3, 2, 2))
    for _ in range(3):
        a, b = whole.draw(), part.draw()
        assert torch.equal(a[[3, 1]], b)


def test_noise_differs_between_images_seeds_and_draws():
    noise = SeededNoise(7, range(4), (3, 8, 8))
    draws = torch.cat([noise.draw(), noise.draw(), SeededNoise(8, range(4), (3, 8, 8)).draw()]).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(12)
    assert correlation.abs().max() < 0.35                 # 5 standard deviations of unrelated noise
    assert abs(float(draws.mean())) < 0.1 and abs(float(draws.std()) - 1) < 0.05

"""Samplers add less noise of their own where a quantized network brings some: all that they ask of
a correction is sigma_q^2 at a time."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_close

from base.seeds import SeededNoise
from ddim.sampler import SAMPLERS, ddim, ddpm
from ddim.schedule import make_schedule, step_sequence


def bringing(variance):
    """A correction of that sigma_q^2 at step 700, which is all that a sampler asks of one."""
    return SimpleNamespace(noise_variance=lambda t: {700: variance}.get(t, 0.0))


def moved(sampler, *, e=0.3, z=0.0, sigma_q=None, eta=0.8, **habits):
    """Where the step from 700 to 400 takes one value, in double precision."""
    x, seen = torch.full((1, 1, 1, 1), 0.2, dtype=torch.float64), []
    sampler(
        lambda x, t: torch.full_like(x, e),
        x,
        [400, 700],
        make_schedule(clip=False, **habits),
        eta=eta,
        noise=lambda: torch.full_like(x, z),
        callback=lambda step, t, x, *_: seen.append(float(x)),
        correction=None if sigma_q is None else bringing(sigma_q**2),
    )
    return seen[1]


@pytest.mark.parametrize("sampler", [ddim, ddpm])
@pytest.mark.parametrize(
    "habits", [{}, {"variance": "small"}, {"space": "latent"}, {"as_released": True}]
)
def test_noise_of_eps_and_noise_of_the_sampler_add_up_to_its_variance(sampler, habits):
    """What a unit of eps and of z does to x is measured, not derived: c^2 sigma_q^2 + sigma'^2 =
    sigma^2."""
    sigma = moved(sampler, z=1.0, **habits) - moved(sampler, **habits)
    c = moved(sampler, e=1.3, **habits) - moved(sampler, **habits)
    for share in (0.0, 0.3, 1.0, 5.0):
        left = moved(sampler, z=1.0, sigma_q=share**0.5 * sigma / c, **habits) - moved(
            sampler, **habits
        )
        assert left == pytest.approx(sigma * max(1 - share, 0.0) ** 0.5, rel=1e-5, abs=1e-6)
        # the mean is left alone
        assert moved(sampler, sigma_q=share, **habits) == moved(sampler, **habits)


def test_variance_of_ddim_by_hand():
    a, b = (make_schedule().level(s) for s in (700, 400))
    sigma = 0.8 * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    c = math.sqrt(1 - b - sigma**2) - math.sqrt(b * (1 - a) / a)
    left = moved(ddim, z=1.0, sigma_q=0.1) - moved(ddim, sigma_q=0.1)
    assert left == pytest.approx(math.sqrt(sigma**2 - c**2 * 0.01), rel=1e-6)
    assert moved(ddim, z=1.0, sigma_q=1.01 * sigma / c) == moved(ddim)  # clamped at zero


def test_variance_of_ddpm_by_hand():
    a, b = (make_schedule().level(s) for s in (700, 400))
    alpha, beta = a / b, 1 - a / b
    left = moved(ddpm, z=1.0, sigma_q=0.1) - moved(ddpm, sigma_q=0.1)
    assert left == pytest.approx(
        math.sqrt(0.64 * beta - beta**2 * 0.01 / (alpha * (1 - a))), rel=1e-6
    )
    assert moved(ddpm, z=1.0, sigma_q=30.0) == moved(ddpm)


@pytest.mark.parametrize("habits", [{}, {"as_released": True}, {"variance": "learned"}])
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_a_correction_without_variance_changes_no_bit(name, eta, habits):
    def run(correction):
        noise, schedule = SeededNoise(0, [0, 1], (3, 4, 4)), make_schedule(**habits)
        return SAMPLERS[name](
            lambda x, t: torch.cat([0.1 * x, torch.full_like(x, 0.2)], dim=1),
            noise.draw(),
            step_sequence("uniform", 20, schedule),
            schedule,
            noise=noise.draw,
            eta=eta,
            correction=correction,
        )

    assert torch.equal(run(None), run(bringing(0.0)))
    assert torch.equal(run(None), run(bringing(0.1))) == (eta == 0)


def test_learned_variance_shrinks_at_every_value():
    """v = 0.5 in one half of the image, -1 in the other: both lose the same variance."""

    def run(variance, z):
        x, v, seen = torch.zeros(1, 1, 1, 2), torch.tensor([[[[0.5, -1.0]]]]), []
        ddpm(
            lambda x, t: torch.cat([0 * x, v], dim=1),
            x,
            [400, 700],
            make_schedule(variance="learned", clip=False),
            noise=lambda: torch.full_like(x, z),
            callback=lambda step, t, x, *_: seen.append(x),
            correction=bringing(variance),
        )
        return seen[1].flatten()

    a, b = (make_schedule().level(s) for s in (700, 400))
    brought = (1 - a / b) ** 2 * 0.02 / (a / b * (1 - a))
    assert_close(run(0.02, 1.0), (run(0.0, 1.0) ** 2 - brought).clamp(min=0).sqrt(), 1e-5)

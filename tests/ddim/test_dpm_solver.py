"""DPM-Solver converges at its order; steps it cannot take end in a sentence. Recorded runs:
test_sampler.py."""

import math

import pytest
import torch

from ddim.dpm_solver import dpm_solver, step_sizes
from ddim.schedule import Schedule, make_schedule, step_sequence

SMOOTH = Schedule(torch.linspace(math.log(0.9), math.log(0.2), 1000, dtype=torch.float64).exp())
SPREAD = 0.5  # standard deviation of the data


def exact_eps(x, t):
    """For normal data of that spread: eps = sigma x / (alpha^2 spread^2 + sigma^2)."""
    a = math.exp(math.log(0.9) + (math.log(0.2) - math.log(0.9)) * float(t[0]) / 999)
    return (1 - a) ** 0.5 * x / (a * SPREAD**2 + 1 - a)


def error(num, **options):
    """The flow scales x by the ratio of the standard deviations at its ends."""
    deviation = [(float(a) * SPREAD**2 + 1 - float(a)) ** 0.5 for a in SMOOTH.abar[[0, -1]]]
    x = dpm_solver(
        exact_eps,
        torch.ones(1, 1, 1, 1, dtype=torch.float64),
        step_sequence("time_uniform", num, SMOOTH),
        SMOOTH,
        first_order_end=0,
        **options,
    )
    return abs(float(x) - deviation[0] / deviation[1])


@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
@pytest.mark.parametrize(
    "method, order, expected",
    [
        ("multistep", 1, 1),
        ("multistep", 2, 2),
        ("multistep", 3, 1.9),
        ("singlestep", 1, 1),
        ("singlestep", 2, 2),
        ("singlestep", 3, 3),
    ],
)
def test_error_falls_with_the_order(algorithm, method, order, expected, monkeypatch):
    # Multistep of order 3 has a formula of order 2 with a small error: its curve is half of what a
    # third order needs. no short ends
    monkeypatch.setattr("ddim.dpm_solver.step_sizes", lambda num, order: [order] * (num // order))
    coarse, fine = (
        error(num, algorithm=algorithm, method=method, order=order) for num in (192, 384)
    )
    assert math.log2(coarse / fine) > expected - 0.2


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num", range(1, 14))
def test_single_steps_spend_every_evaluation(order, num):
    sizes = step_sizes(num, order)
    assert sum(sizes) == num and max(sizes) <= order and (order < 3 or sizes[-1] < 3)


@pytest.mark.parametrize("skip, space", [("uniform", "pixel"), ("quad", "latent")])
def test_impossible_steps(skip, space):
    schedule = make_schedule(space=space)
    with pytest.raises(
        ValueError, match="ends at step 0 and needs steps above it, all different.* time_uniform"
    ):
        dpm_solver(None, torch.zeros(1, 3, 2, 2), step_sequence(skip, 100, schedule), schedule)


def test_latent_uniform_steps_are_possible():
    schedule, seen = make_schedule(space="latent"), []
    dpm_solver(
        lambda x, t: 0.1 * x,
        torch.ones(1, 3, 2, 2),
        step_sequence("uniform", 5, schedule),
        schedule,
        callback=lambda step, t, *_: seen.append(t),
    )
    assert seen == [801, 601, 401, 201, 1]

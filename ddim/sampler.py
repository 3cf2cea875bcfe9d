"""Samplers: functions of one signature, for every model.

    sampler(eps, x, steps, schedule, *, noise, eta, callback) -> x_0

`eps(x, t)` is the network (guidance inside) with x (N, C, H, W) and its time t (N,); it answers C
channels, or 2C where it has a learned variance (eps first). `steps` ascend as made by
`step_sequence`. `noise()` draws one tensor shaped as x and is called once per step, so that the
stream of an image does not depend on eta; deterministic samplers never call it and take no eta but
0. `callback(step, t, x, eps, x0, noise)` observes every network evaluation, the `step`-th, and must
not change anything: t is the network's time, eps its whole answer, x0 the clean image that the
update goes on with.

The samplers of STOCHASTIC also take `correction` (quant/network.py) of a quantized network,
whose eps, corrected already, still brings noise of a known variance into x: they add that much less
of their own."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from base.network import batch_of
from ddim.dpm_solver import dpm_solver
from ddim.schedule import Schedule

Eps = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Steps = Sequence[float]
Callback = Callable[..., Any]
Number = float | torch.Tensor


class Correction(Protocol):
    """What a sampler asks of the correction of a quantized network."""

    def noise_variance(self, t: float) -> float:
        """The variance of the noise in eps at the network's time t."""


def chain(steps: Steps) -> list[tuple[int, float, float]]:
    """Turns ascending steps into (index, step, next step) from noise to image; the last has -1."""
    descending = list(reversed(steps))
    return list(zip(range(len(steps)), descending, descending[1:] + [-1]))


def nothing(*_: Any) -> None:
    """The callback of a run that nobody observes."""


def ddim(
    eps: Eps,
    x: torch.Tensor,
    steps: Steps,
    schedule: Schedule,
    *,
    noise: Callable[[], torch.Tensor],
    eta: float = 0.0,
    callback: Callback = nothing,
    correction: Correction | None = None,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, Eq. 12 and 16): deterministic at eta 0, DDPM's variance at eta 1."""
    for step, s, s_next in chain(steps):
        a, a_next, t = schedule.level(s), schedule.level(s_next), s * schedule.time_scale
        answer, z = eps(x, batch_of(t, x)), noise()
        e = answer[:, : x.shape[1]]
        x0 = (x - (1 - a) ** 0.5 * e) / a**0.5  # predicted clean image
        if schedule.clip:
            x0 = x0.clamp(-1, 1)
            e = (x - a**0.5 * x0) / (1 - a) ** 0.5  # the noise that leads to it
        sigma = eta * max((1 - a / a_next) * (1 - a_next) / (1 - a), 0.0) ** 0.5
        callback(step, t, x, answer, x0, z)
        # PTQD's code takes the smaller sigma here as well
        direction = max(1 - a_next - sigma**2, 0.0) ** 0.5
        weight = direction - (a_next * (1 - a) / a) ** 0.5  # of e in the next x
        x = a_next**0.5 * x0 + direction * e + noise_to_add(sigma, weight, correction, t) * z
    return x


def ddpm(
    eps: Eps,
    x: torch.Tensor,
    steps: Steps,
    schedule: Schedule,
    *,
    noise: Callable[[], torch.Tensor],
    eta: float = 1.0,
    callback: Callback = nothing,
    correction: Correction | None = None,
) -> torch.Tensor:
    """Ancestral sampling of the chain that visits `steps` (Ho et al. 2020, Algorithm 2): a thinned
    chain has the betas 1 - a / a_next. The last step, to level 1, has no noise; `eta` scales it."""
    for step, s, s_next in chain(steps):
        a, t = schedule.level(s), s * schedule.time_scale
        a_next = schedule.level(s_next) if s_next >= 0 else 1.0
        beta = 1 - a / a_next
        answer, z = eps(x, batch_of(t, x)), noise()
        e, v = answer[:, : x.shape[1]], answer[:, x.shape[1] :]
        x0 = (x - (1 - a) ** 0.5 * e) / a**0.5
        if schedule.as_released:  # the same number, rounded differently
            x0 = (1 / a) ** 0.5 * x - (1 / a - 1) ** 0.5 * e
        if schedule.clip is not False:
            x0 = x0.clamp(-1, 1)
        callback(step, t, x, answer, x0, z)
        x = (a_next**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - a_next) * x) / (1 - a)  # Eq. 7
        if s_next >= 0:
            sigma = eta * deviation(schedule, beta, beta * (1 - a_next) / (1 - a), v)
            weight = beta * (a_next / (a * (1 - a))) ** 0.5  # of -e in the next x
            x = x + noise_to_add(sigma, weight, correction, t) * z
    return x


def deviation(schedule: Schedule, beta: Number, posterior: Number, v: torch.Tensor) -> Number:
    """Standard deviation of an ancestral step: of beta ("large"), of the posterior ("small"), or by
    v in [-1, 1] between their logarithms ("learned"; Nichol & Dhariwal 2021, Eq. 15)."""
    if schedule.variance == "large":
        return (0.5 * beta.log()).exp() if schedule.as_released else max(beta, 0.0) ** 0.5
    if schedule.variance == "small":
        return max(posterior, 1e-20) ** 0.5
    if not v.shape[1]:
        raise ValueError(
            "the schedule has a learned variance, but the network answers eps alone; set "
            "schedule.variance to large or small"
        )
    low, high = (math.log(max(value, 1e-20)) for value in (posterior, beta))
    share = (v + 1) / 2
    return (0.5 * (share * high + (1 - share) * low)).exp()


def noise_to_add(sigma: Number, weight: Number, correction: Correction | None, t: float) -> Number:
    """Deviation of a step's noise where eps enters with `weight` and an error of variance sigma_q^2
    (PTQD, He et al. 2023, arXiv:2305.10657): sigma'^2 = max(sigma^2 - weight^2 sigma_q^2, 0)."""
    brought = 0.0 if correction is None else weight**2 * correction.noise_variance(t)
    if not brought:
        return sigma  # the very number, which the root of its square need not be
    return torch.as_tensor(sigma**2 - brought).clamp(min=0).sqrt()


ADAMS_BASHFORTH = (
    (1,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def plms(
    eps: Eps,
    x: torch.Tensor,
    steps: Steps,
    schedule: Schedule,
    *,
    noise: Callable[[], torch.Tensor],
    eta: float = 0.0,
    callback: Callback = nothing,
) -> torch.Tensor:
    """Pseudo linear multistep (Liu et al. 2022, arXiv:2202.09778, Section 3.3): DDIM's step with an
    eps extrapolated from the last four by Adams and Bashforth's formulas. The first step is done
    twice (pseudo improved Euler)."""
    if eta:
        raise ValueError(
            f"plms is deterministic, but eta is {eta}; set eta to 0, or choose ddim or ddpm"
        )
    past, calls = [], 0

    def move(x, e, a, a_next):  # Eq. 11 -> predicted clean image, x at the next level
        x0 = (x - (1 - a) ** 0.5 * e) / a**0.5
        return x0, a_next**0.5 * x0 + (1 - a_next) ** 0.5 * e

    for step, s, s_next in chain(steps):
        a, a_next, t = schedule.level(s), schedule.level(s_next), s * schedule.time_scale
        answer = eps(x, batch_of(t, x))
        past = [answer[:, : x.shape[1]], *past][:4]  # newest first
        e = sum(weight * old for weight, old in zip(ADAMS_BASHFORTH[len(past) - 1], past))
        x0, x_next = move(x, e, a, a_next)
        callback(calls, t, x, answer, x0, None)
        calls += 1
        if step == 0:  # again, with the mean of both ends
            t = max(s_next, steps[0]) * schedule.time_scale
            answer = eps(x_next, batch_of(t, x))
            x0, x_again = move(x, (e + answer[:, : x.shape[1]]) / 2, a, a_next)
            callback(calls, t, x_next, answer, x0, None)
            x_next, calls = x_again, calls + 1
        x = x_next
    return x


SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "plms": plms,
    "dpm_solver_2m": partial(dpm_solver, algorithm="dpmsolver", order=2, method="multistep"),
    "dpm_solver_3s": partial(dpm_solver, algorithm="dpmsolver", order=3, method="singlestep"),
    "dpm_solver_pp_2m": partial(dpm_solver, algorithm="dpmsolver++", order=2, method="multistep"),
    "dpm_solver_pp_3s": partial(dpm_solver, algorithm="dpmsolver++", order=3, method="singlestep"),
}
STOCHASTIC = ("ddim", "ddpm")


def num_evaluations(sampler: str, steps: Steps) -> int:
    """Counts how often a sampler of SAMPLERS runs the network (and calls back) through `steps`."""
    return len(steps) + (sampler == "plms")

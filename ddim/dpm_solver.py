"""DPM-Solver (Lu et al. 2022, arXiv:2206.00927) and DPM-Solver++ (arXiv:2211.01095): samplers, see
ddim/sampler.py.

x = alpha x0 + sigma eps. In lambda = log(alpha / sigma) the linear part of the diffusion equation
is solved exactly; what is left is an integral of the network's prediction m, which is eps in the
first paper and x0 in the second. Here m is a polynomial in lambda through several predictions, and
both papers' updates are one formula (see `Path.move`)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ddim.schedule import Schedule

# x (N, C, H, W) and the index of a point -> the prediction m there
Predict = Callable[[torch.Tensor, int], torch.Tensor]
Number = torch.Tensor | float


class Path:
    """Descending `steps`, fractions allowed, with alpha, sigma and lambda at each, by index."""

    def __init__(self, steps: Sequence[float], schedule: Schedule, algorithm: str) -> None:
        self.steps, self.algorithm = steps, algorithm
        log_alpha = schedule.abar.double().log().numpy() / 2  # linear between two steps
        alpha = np.exp(np.interp(steps, np.arange(len(log_alpha)), log_alpha))
        sigma = np.sqrt(1 - alpha**2)
        self.alpha, self.sigma = alpha.tolist(), sigma.tolist()
        self.lamb = np.log(alpha / sigma).tolist()

    def __len__(self) -> int:
        return len(self.steps) - 1

    def move(
        self,
        x: torch.Tensor,
        i: int,
        k: int,
        m: torch.Tensor,
        slope: Number = 0.0,
        curve: Number = 0.0,
    ) -> torch.Tensor:
        """x at point k from x at i, with the prediction m at i and its slope in lambda.

        x_k = ratio x_i - scale (phi_1 m + phi_2 h slope + phi_3 h^2 curve)
        eps:  ratio = alpha_k / alpha_i,  scale = sigma_k,  phi of h
        x0:   ratio = sigma_k / sigma_i,  scale = alpha_k,  phi of -h
        h = lambda_k - lambda_i"""
        h = self.lamb[k] - self.lamb[i]
        ratio, scale, z = self.alpha[k] / self.alpha[i], self.sigma[k], h
        if self.algorithm == "dpmsolver++":
            ratio, scale, z = self.sigma[k] / self.sigma[i], self.alpha[k], -h
        phi_1 = math.expm1(z)
        phi_2 = phi_1 / z - 1
        phi_3 = phi_2 / z - 1 / 2
        return ratio * x - scale * (phi_1 * m + phi_2 * h * slope + phi_3 * h**2 * curve)

    def move_midway(
        self, x: torch.Tensor, i: int, k: int, m: torch.Tensor, slope: Number
    ) -> torch.Tensor:
        """The second-order update of both papers: the prediction keeps its value midway."""
        return self.move(x, i, k, m + (self.lamb[k] - self.lamb[i]) / 2 * slope)


def multistep(
    path: Path, predict: Predict, x: torch.Tensor, order: int, first_order_end: int
) -> torch.Tensor:
    """Slopes from earlier predictions; in under `first_order_end` steps the last are of order 1."""
    past, lamb = [], path.lamb  # predictions, newest first
    for i in range(len(path)):
        past = [predict(x, i), *past][:order]
        points = min(len(past), len(path) - i) if len(path) < first_order_end else len(past)
        if points == 1:
            x = path.move(x, i, i + 1, past[0])
            continue
        slope = (past[0] - past[1]) / (lamb[i] - lamb[i - 1])
        if points == 2:
            x = path.move_midway(x, i, i + 1, past[0], slope)
        else:  # the authors' code takes the divided difference, half of m'', for curve
            before = (past[1] - past[2]) / (lamb[i - 1] - lamb[i - 2])
            curve = (slope - before) / (lamb[i] - lamb[i - 2])
            x = path.move(x, i, i + 1, past[0], slope + (lamb[i] - lamb[i - 1]) * curve, curve)
    return x


def singlestep(path: Path, predict: Predict, x: torch.Tensor, order: int, _: int) -> torch.Tensor:
    """Steps over up to `order` points, with one prediction at each; the last steps are shorter."""
    i = 0
    for size in step_sizes(len(path), order):
        k, m, slope = i + size, predict(x, i), 0.0
        for j in range(i + 1, k):
            slope = (predict(path.move(x, i, j, m, slope), j) - m) / (path.lamb[j] - path.lamb[i])
        x = path.move_midway(x, i, k, m, slope) if size == 2 else path.move(x, i, k, m, slope)
        i = k
    return x


def step_sizes(num: int, order: int) -> list[int]:
    """Points that each single step covers, for `num` evaluations in all; order 3 ends below 3."""
    if order == 3 and num % 3 == 0:
        return [3] * (num // 3 - 1) + [2, 1]
    return [order] * (num // order) + [num % order] * (num % order > 0)


METHODS = {"multistep": multistep, "singlestep": singlestep}


def dpm_solver(
    eps: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    steps: Sequence[float],
    schedule: Schedule,
    *,
    noise: Any = None,
    eta: float = 0.0,
    callback: Callable[..., Any] = lambda *_: None,
    algorithm: str = "dpmsolver++",
    order: int = 2,
    method: str = "multistep",
    first_order_end: int = 15,
) -> torch.Tensor:
    """From the noisiest of `steps`, which are the points of evaluation, down to step 0. `algorithm`
    is "dpmsolver" or "dpmsolver++", `order` 1 to 3. The authors' first version and latent diffusion
    have 15 for `first_order_end`, later versions 10. Raises ValueError for steps it cannot take,
    and for an eta: nothing is random here."""
    if eta:
        raise ValueError(
            f"dpm_solver is deterministic, but eta is {eta}; set eta to 0, or choose ddim or ddpm"
        )
    if steps[0] <= 0 or any(low >= high for low, high in zip(steps, steps[1:])):
        raise ValueError(
            "dpm_solver ends at step 0 and needs steps above it, all different, but the sequence "
            f"begins {steps[:3]}; choose skip: time_uniform"
        )
    path, calls = Path([*reversed(steps), 0], schedule, algorithm), 0

    def predict(x, i):
        nonlocal calls
        t = path.steps[i] * schedule.time_scale
        answer = eps(x, torch.full((len(x),), float(t), device=x.device))
        e = answer[:, : x.shape[1]]
        x0 = (x - path.sigma[i] * e) / path.alpha[i]
        callback(calls, t, x, answer, x0, None)
        calls += 1
        return x0 if algorithm == "dpmsolver++" else e

    return METHODS[method](path, predict, x, order, first_order_end)

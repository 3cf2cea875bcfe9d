"""Noise schedules and step sequences.

A schedule is the table abar[t] = prod_{s<=t} (1 - beta[s]) (Ho et al. 2020, Eq. 4); a step sequence is the list of
network steps a sampler visits, noisiest last. Pixel-space and latent-diffusion code differ in three facts that
change images: the precision of the product, the +1 on latent steps, and the level that follows the last step.
"""
from dataclasses import dataclass

import numpy as np
import torch


def linear(num, start, end):
    """DDPM: evenly spaced betas."""
    return np.linspace(start, end, num, dtype=np.float64)


def scaled_linear(num, start, end):
    """Latent diffusion ("linear" in its YAML files): evenly spaced square roots of beta."""
    return np.linspace(start ** 0.5, end ** 0.5, num, dtype=np.float64) ** 2


def cosine(num, offset=0.008, largest=0.999):
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17: abar follows a squared cosine; betas are capped."""
    t = np.arange(num + 1, dtype=np.float64) / num
    level = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.clip(1 - level[1:] / level[:-1], 0, largest)


BETAS = {"linear": linear, "quad": scaled_linear, "scaled_linear": scaled_linear, "cosine": cosine}


@dataclass(frozen=True)
class Schedule:
    """abar (T,) float32 and the level after the last step: 1 in pixel space, abar[0] in latent diffusion."""
    abar: torch.Tensor
    final: float = 1.0
    step_offset: int = 0                   # latent diffusion visits steps + 1

    def level(self, t):
        """abar at step t as a Python float; t = -1 is the level after the last step."""
        return float(self.abar[t]) if t >= 0 else self.final

    @property
    def num_timesteps(self):
        return len(self.abar)


def make_schedule(*, kind="linear", timesteps=1000, beta_start=1e-4, beta_end=2e-2, space="pixel"):
    """Schedule from a model YAML. `space` is "pixel" (product in float32, ends at 1) or "latent" (product in
    float64, steps + 1, ends at abar[0]). Raises ValueError for an unknown kind or space."""
    if kind not in BETAS:
        raise ValueError(f"schedule kind '{kind}' is unknown; choose one of {', '.join(BETAS)}")
    if space not in ("pixel", "latent"):
        raise ValueError(f"schedule space '{space}' is unknown; choose pixel or latent")
    betas = BETAS[kind](timesteps) if kind == "cosine" else BETAS[kind](timesteps, beta_start, beta_end)
    if space == "pixel":                   # the public pixel-space code multiplies in float32
        return Schedule(torch.from_numpy(1 - betas.astype(np.float32)).cumprod(0))
    abar = torch.from_numpy(np.cumprod(1 - betas).astype(np.float32))
    return Schedule(abar, final=float(abar[0]), step_offset=1)


def step_sequence(skip, num_steps, schedule):
    """Ascending network steps. `uniform`: 0, c, 2c, ... with c = T // S, so there are more than S steps where S does
    not divide T. `quad`: int(linspace(0, sqrt(0.8 T), S)^2), whose first entries may repeat and whose noisiest step
    is 0.8 T (Song et al. 2021, D.3). Raises ValueError for an impossible count or an unknown word."""
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(f"{num_steps} sampling steps asked for; a chain of {total} steps allows 1 to {total}")
    if skip == "uniform":
        steps = list(range(0, total, total // num_steps))
    elif skip == "quad":
        steps = [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), num_steps) ** 2]
    else:
        raise ValueError(f"step sequence '{skip}' is unknown; choose uniform or quad")
    steps = [s + schedule.step_offset for s in steps]
    if steps[-1] >= total:
        raise ValueError(f"{num_steps} {skip} steps run past the end of the chain of {total} (last step {steps[-1]}); "
                         "choose a count that divides the chain")
    return steps

"""Noise schedules and step sequences.

A schedule is the table abar[t] = prod_{s<=t} (1 - beta[s]) (Ho et al. 2020, Eq. 4) and the habits
of the code its models were published with; a step sequence is the list of steps a sampler visits,
noisiest last."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

# ---- betas: (num, start, end, cosine_s) -> (num,) float64


def linear(num: int, start: float, end: float, _: float) -> np.ndarray:
    """DDPM: evenly spaced betas."""
    return np.linspace(start, end, num, dtype=np.float64)


def scaled_linear(num: int, start: float, end: float, _: float) -> np.ndarray:
    """Latent diffusion ("linear" in its YAML files): evenly spaced square roots of beta."""
    return np.linspace(start**0.5, end**0.5, num, dtype=np.float64) ** 2


def improved_linear(num: int, start: float, end: float, _: float) -> np.ndarray:
    """Nichol & Dhariwal 2021: start and end of 1000 steps; all lengths add equal noise."""
    return linear(num, start * 1000 / num, end * 1000 / num, _)


def cosine(num: int, start: float, end: float, cosine_s: float) -> np.ndarray:
    """Nichol & Dhariwal 2021 (arXiv:2102.09672), Eq. 17: abar is a squared cosine, betas capped."""
    t = np.arange(num + 1, dtype=np.float64) / num
    level = np.cos((t + cosine_s) / (1 + cosine_s) * np.pi / 2) ** 2
    return np.clip(1 - level[1:] / level[:-1], 0, 0.999)


BETAS = {  # "sqrt_linear" is what latent diffusion calls plain linear betas.
    "linear": linear,
    "quad": scaled_linear,
    "scaled_linear": scaled_linear,
    "sqrt_linear": linear,
    "improved_linear": improved_linear,
    "cosine": cosine,
}


# ---- schedules


@dataclass(frozen=True)
class Schedule:
    """abar (T,), kept on the CPU, and what a model's samplers have to know about it."""

    abar: torch.Tensor
    final: float = 1.0  # level after the last step: 1 in pixel space, abar[0] in latent diffusion
    step_offset: int = 0  # latent diffusion visits uniform and quad steps + 1
    time_scale: float = 1  # the network's time is step * time_scale
    variance: str = "large"  # of ancestral sampling, one of VARIANCES
    clip: bool | None = None  # predicted x0 clamped to [-1, 1]; None: by ddpm but not by ddim
    as_released: bool = False  # coefficients rounded as in the public code, to retrace its images

    def level(self, t: int) -> float | torch.Tensor:
        """abar at step t; t = -1 is the level after the last step. A Python float, so that what
        follows from it has double precision, or as released a number of abar's own precision.
        Raises ValueError for a fraction."""
        if isinstance(t, float):
            raise ValueError(
                f"step {t:g} may lie between two steps, which only the DPM-Solvers allow; choose "
                "another sequence than time_uniform"
            )
        level = float(self.abar[t]) if t >= 0 else self.final
        return torch.tensor(level, dtype=self.abar.dtype) if self.as_released else level

    @property
    def num_timesteps(self) -> int:
        return len(self.abar)


VARIANCES = ("large", "small", "learned")
SPACES = {  # three bodies of public code, three habits
    "pixel": {"variance": "large", "clip": None},  # DDPM, DDIM: product in float32
    # improved and guided diffusion: product in float64
    "pixel64": {"variance": "learned", "clip": True},
    # latent diffusion: product in float64, kept as float32
    "latent": {"variance": "small", "clip": False},
}


def make_schedule(
    *,
    kind: str = "linear",
    timesteps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 2e-2,
    cosine_s: float = 0.008,
    space: str = "pixel",
    rescale_timesteps: bool = False,
    variance: str | None = None,
    clip: bool | None = None,
    as_released: bool = False,
) -> Schedule:
    """Makes the schedule of a model YAML.

    `space` says whose habits the model has: "pixel", "pixel64" or "latent" (steps + 1, ends at
    abar[0]); `variance` and `clip` override its choice; with `rescale_timesteps` the network counts
    time from 0 to 1000 whatever the length of the chain; `as_released` rounds as the public code
    does (ddpm on small steps is far from exact there). Raises ValueError for an unknown word."""
    if space not in SPACES:
        raise ValueError(f"schedule space '{space}' is unknown; choose one of {', '.join(SPACES)}")
    if variance not in (None, *VARIANCES):
        raise ValueError(
            f"schedule variance '{variance}' is unknown; choose one of {', '.join(VARIANCES)}"
        )
    betas = make_betas(kind, timesteps, beta_start, beta_end, cosine_s)
    habits = {"time_scale": 1000 / timesteps if rescale_timesteps else 1, **SPACES[space]}
    asked = {"variance": variance, "clip": clip, "as_released": as_released}
    habits |= {key: value for key, value in asked.items() if value is not None}
    if space == "pixel":  # the public pixel-space code multiplies in float32
        return Schedule(torch.from_numpy(1 - betas.astype(np.float32)).cumprod(0), **habits)
    abar = torch.from_numpy(np.cumprod(1 - betas))
    if space == "pixel64":
        return Schedule(abar, **habits)
    abar = abar.float()
    return Schedule(abar, final=float(abar[0]), step_offset=1, **habits)


def make_betas(
    kind: str, num: int, start: float = 1e-4, end: float = 2e-2, cosine_s: float = 0.008
) -> np.ndarray:
    """Makes (num,) float64 betas; `kind` is a word of BETAS, else ValueError."""
    if kind not in BETAS:
        raise ValueError(f"schedule kind '{kind}' is unknown; choose one of {', '.join(BETAS)}")
    return BETAS[kind](num, start, end, cosine_s)


# ---- step sequences: (T, S) -> ascending steps


def uniform(total: int, num: int) -> list[int]:
    """0, c, 2c, ... with c = T // S, so there are more than S steps where S does not divide T."""
    return list(range(0, total, total // num))


def quad(total: int, num: int) -> list[int]:
    """int(linspace(0, sqrt(0.8 T), S)^2), whose first entries may repeat and whose noisiest step is
    0.8 T (Song et al. 2021, D.3)."""
    return [int(s) for s in np.linspace(0, np.sqrt(total * 0.8), num) ** 2]


def respaced(total: int, num: int) -> list[int]:
    """Nichol & Dhariwal 2021, Section 4: S steps from 0 to T - 1 evenly, rounded half to even."""
    stride = (total - 1) / (num - 1) if num > 1 else 1.0
    # summed up: exact halves can differ
    return [int(s) for s in np.cumsum([0.0] + [stride] * (num - 1)).round()]


def sections(total: int, counts: Sequence[int]) -> list[int]:
    """The chain in len(counts) pieces of nearly equal length, longer ones first, each respaced."""
    steps, start = [], 0
    for i, count in enumerate(counts):
        length = total // len(counts) + (i < total % len(counts))
        if not 1 <= count <= length:
            raise ValueError(
                f"section {i + 1} of {len(counts)} asks for {count} of {length} steps; "
                f"choose 1 to {length}"
            )
        steps += [start + s for s in respaced(length, count)]
        start += length
    return steps


def ddim_stride(total: int, num: int) -> list[int]:
    """Improved diffusion's "ddimS": the smallest whole stride from 0 that gives exactly S steps."""
    for stride in range(1, total + 1):
        if len(range(0, total, stride)) == num:
            return list(range(0, total, stride))
    raise ValueError(
        f"no whole stride gives exactly {num} steps in a chain of {total}; choose a count that "
        "divides the chain, or skip: respaced"
    )


def time_uniform(total: int, num: int) -> list[float]:
    """DPM-Solver: the noisy ends of S equal pieces of the time from T - 1 to 0, fractions where
    T - 1 is no multiple of S; 0, where the last piece ends, is not visited."""
    return [(total - 1) * i / num for i in range(1, num + 1)]


STEPS = {
    "uniform": uniform,
    "quad": quad,
    "respaced": respaced,
    "ddim": ddim_stride,
    "time_uniform": time_uniform,
}
OFFSET = ("uniform", "quad")  # sequences that latent diffusion moves by one


def step_sequence(skip: str, num_steps: int, schedule: Schedule) -> list[int] | list[float]:
    """Lists the ascending steps of a word of STEPS, or of counts such as "10,5,5" that add up to
    `num_steps` (see `sections`). Raises ValueError for an impossible count or an unknown word."""
    total = schedule.num_timesteps
    if not 1 <= num_steps <= total:
        raise ValueError(
            f"{num_steps} sampling steps asked for; a chain of {total} steps allows 1 to {total}"
        )
    if re.fullmatch(r"\d+( *, *\d+)*", skip):
        counts = [int(count) for count in skip.split(",")]
        if sum(counts) != num_steps:
            raise ValueError(
                f"step sequence '{skip}' has {sum(counts)} steps, but {num_steps} are asked for; "
                f"set steps to {sum(counts)}"
            )
        return sections(total, counts)
    if skip not in STEPS:
        raise ValueError(
            f"step sequence '{skip}' is unknown; choose one of {', '.join(STEPS)}, or counts "
            "such as 10,5,5"
        )
    steps = STEPS[skip](total, num_steps)
    if skip in OFFSET:
        steps = [s + schedule.step_offset for s in steps]
    if steps[-1] >= total:
        raise ValueError(
            f"{num_steps} {skip} steps run past the end of the chain of {total} (last step "
            f"{steps[-1]}); choose a count that divides the chain"
        )
    return steps

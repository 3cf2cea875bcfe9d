"""Builders: which steps of which recorded trajectories become calibration samples.

A builder(num_steps, num_images, num_samples, rng, features, **options) returns pairs: the step (N,)
and the image (N,) of each sample, and sometimes the times (N,) that the network is told.
`features()` gives those of the middle attention, which `tdac` needs."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from base.errors import check_options, unknown_word
from quant.calibration.tdac import tdac

Features = Callable[[], torch.Tensor]
Pairs = tuple[torch.Tensor, ...]


def uniform(
    num_steps: int, num_images: int, num_samples: int, rng: torch.Generator, features: Features
) -> Pairs:
    """Q-Diffusion's set (arXiv:2302.04304): N / images evenly spaced steps (every so many-th where
    that divides S), the same images at each. Raises ValueError if there are fewer steps."""
    asked = _steps_asked(num_steps, num_images, num_samples)
    return at_each(torch.arange(asked) * num_steps // asked, num_images)


def quad(
    num_steps: int, num_images: int, num_samples: int, rng: torch.Generator, features: Features
) -> Pairs:
    """As `uniform`, but denser towards the image, as the quad sequence of DDIM (Song et al. 2021,
    D.3): its i-th step from the image end is (i / (N / images - 1))^2 (S - 1), or i where that is
    more, so that no step occurs twice."""
    asked = _steps_asked(num_steps, num_images, num_samples)
    roots = torch.linspace(0, (num_steps - 1) ** 0.5, asked, dtype=torch.float64)
    place = roots.square().round().long().maximum(torch.arange(asked))
    return at_each(num_steps - 1 - place.flip(0), num_images)


def _steps_asked(num_steps, num_images, num_samples):
    asked = num_samples // num_images
    if not 1 <= asked <= num_steps:
        raise ValueError(
            f"{asked} calibration steps asked for, the trajectory has {num_steps}; set "
            f"calibration.steps to 1 to {num_steps}"
        )
    return asked


def segments(
    num_steps: int,
    num_images: int,
    num_samples: int,
    rng: torch.Generator,
    features: Features,
    *,
    first: float = 0.0,
    last: float = 1.0,
    stride: int = 2,
) -> Pairs:
    """The multi-model set (repository yeefei13/T-diffusion): every `stride`-th step between the
    fractions `first` and `last` of the S steps (0 is the noisy end), the same images at each; at
    most N samples. Raises ValueError if that leaves nothing."""
    steps = torch.arange(num_steps)[round(first * num_steps) : round(last * num_steps) : stride]
    if not 1 <= len(steps) <= num_samples:
        raise ValueError(
            f"a segment from {first} to {last} with stride {stride} has {len(steps)} of "
            f"{num_steps} steps for {num_samples} samples; widen it or change the stride"
        )
    return at_each(steps, min(num_images, num_samples // len(steps)))


def random(
    num_steps: int, num_images: int, num_samples: int, rng: torch.Generator, features: Features
) -> Pairs:
    """Every step equally likely."""
    return torch.randint(num_steps, (num_samples,), generator=rng), in_turn(num_samples, num_images)


def linspace(
    num_steps: int, num_images: int, num_samples: int, rng: torch.Generator, features: Features
) -> Pairs:
    """Uniform steps of I2N and DI2N (repository iszry/HKU_2023_Summer_Research): N points evenly
    spaced over the chain, both ends included, shuffled."""
    points = torch.arange(num_samples, dtype=torch.float64)
    place = points * (num_steps - 1) / max(num_samples - 1, 1)
    step = num_steps - 1 - place.round().long()
    return step[torch.randperm(num_samples, generator=rng)], in_turn(num_samples, num_images)


def normal(
    num_steps: int,
    num_images: int,
    num_samples: int,
    rng: torch.Generator,
    features: Features,
    *,
    mean: float = 0.4,
    std: float = 0.4,
    resample: bool = False,
    pairing: str = "correct",
) -> Pairs:
    """Normally distributed time steps (PTQ4DM, Shang et al. 2023, arXiv:2211.15736, Algorithm 1):

        i = clip(floor(n), 0, S - 1),  n ~ Normal(mean S, std S),
        i the place in the chain from the image end

    What falls off the ends is clipped to them, or with `resample` drawn again.

    `pairing: legacy` is the released code's mistake: the number drawn counts iterations from the
    noisy end, the sample is the state after that iteration, and the network is told that count
    instead of a step of the schedule."""
    if std <= 0 or pairing not in ("correct", "legacy"):
        raise ValueError(
            f"builder 'normal' has std {std} and pairing '{pairing}'; it takes a std above 0 and "
            "pairing correct or legacy"
        )
    ends = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / std
    low, high = torch.special.ndtr(ends).tolist() if resample else (0, 1)
    place = _chain_index(mean + std * _between_quantiles(low, high, num_samples, rng), num_steps)
    image = in_turn(num_samples, num_images)
    if pairing == "legacy":
        return place + 1, image, place.float()
    return num_steps - 1 - place, image


def half_normal(
    num_steps: int,
    num_images: int,
    num_samples: int,
    rng: torch.Generator,
    features: Features,
    *,
    std: float = 0.3,
) -> Pairs:
    """|Normal(0, std)| as a fraction of the chain from the image end, clipped to the noisy end
    (iszry/HKU_2023_Summer_Research)."""
    place = _chain_index(std * _between_quantiles(0.5, 1, num_samples, rng), num_steps)
    return num_steps - 1 - place, in_turn(num_samples, num_images)


def _between_quantiles(low, high, num, rng):
    """Draws `num` standard normal values between two of its quantiles."""
    shares = torch.rand(num, generator=rng, dtype=torch.float64)
    return torch.special.ndtri(low + (high - low) * shares)


def _chain_index(fraction, num_steps):
    return (fraction * num_steps).floor().clamp(0, num_steps - 1).long()


def at_each(steps: torch.Tensor, num_images: int) -> Pairs:
    """Pairs all `steps` with the first images, where the image runs fastest."""
    return steps.repeat_interleave(num_images), torch.arange(num_images).repeat(len(steps))


def in_turn(num_samples: int, num_images: int) -> torch.Tensor:
    """Returns the images 0, 1, ... in turn, (num_samples,)."""
    return torch.arange(num_samples) % num_images


FUNCTIONS = uniform, quad, segments, random, linspace, normal, half_normal, tdac
BUILDERS = {function.__name__: function for function in FUNCTIONS}


def check_builder(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an unknown builder or option."""
    if name not in BUILDERS:
        raise ValueError(unknown_word(f"calibration builder '{name}' is unknown", name, BUILDERS))
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    known = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
    check_options(f"calibration builder '{name}'", options, known)

"""Builders: which steps of which recorded trajectories become calibration samples."""

import inspect

import torch

from base.errors import check_options, unknown_word
from quant.calibration.tdac import tdac


def uniform(num_steps, num_images, num_samples, rng, features):
    """Q-Diffusion's set (arXiv:2302.04304): N / images evenly spaced steps (every so many-th where
    that divides S), the same images at each. Raises ValueError if there are fewer steps."""
    asked = steps_asked(num_steps, num_images, num_samples)
    return at_each(torch.arange(asked) * num_steps // asked, num_images)


def quad(num_steps, num_images, num_samples, rng, features):
    """As `uniform`, but denser towards the image, as the quad sequence of DDIM (Song et al. 2021,
    D.3): its i-th step from the image end is (i / (N / images - 1))^2 (S - 1), or i where that is
    more, so that no step occurs twice."""
    asked = steps_asked(num_steps, num_images, num_samples)
    place = (
        torch.linspace(0, (num_steps - 1) ** 0.5, asked, dtype=torch.float64)
        .square()
        .round()
        .long()
    )
    return at_each(num_steps - 1 - place.maximum(torch.arange(asked)).flip(0), num_images)


def steps_asked(num_steps, num_images, num_samples):
    """N / images, the number of steps that all images are used at. Raises ValueError if there are
    fewer."""
    asked = num_samples // num_images
    if not 1 <= asked <= num_steps:
        raise ValueError(
            f"{asked} calibration steps asked for, the trajectory has {num_steps}; set "
            "calibration.steps "
            f"to 1 to {num_steps}"
        )
    return asked


def segments(num_steps, num_images, num_samples, rng, features, *, first=0.0, last=1.0, stride=2):
    """The multi-model set (repository yeefei13/T-diffusion): every `stride`-th step between the
    fractions `first` and `last` of the S steps (0 is the noisy end), the same images at each; at
    most N samples. Raises ValueError if that leaves nothing."""
    steps = torch.arange(num_steps)[round(first * num_steps) : round(last * num_steps) : stride]
    if not 1 <= len(steps) <= num_samples:
        raise ValueError(
            f"a segment from {first} to {last} with stride {stride} has {len(steps)} of "
            f"{num_steps} steps "
            f"for {num_samples} samples; widen it or change the stride"
        )
    return at_each(steps, min(num_images, num_samples // len(steps)))


def random(num_steps, num_images, num_samples, rng, features):
    """Every step equally likely."""
    return torch.randint(num_steps, (num_samples,), generator=rng), in_turn(num_samples, num_images)


def linspace(num_steps, num_images, num_samples, rng, features):
    """Uniform steps of I2N and DI2N (repository iszry/HKU_2023_Summer_Research): N points evenly
    spaced over the chain, both ends included, shuffled."""
    place = (
        torch.arange(num_samples, dtype=torch.float64) * (num_steps - 1) / max(num_samples - 1, 1)
    )
    step = num_steps - 1 - place.round().long()
    return step[torch.randperm(num_samples, generator=rng)], in_turn(num_samples, num_images)


def normal(
    num_steps,
    num_images,
    num_samples,
    rng,
    features,
    *,
    mean=0.4,
    std=0.4,
    resample=False,
    pairing="correct",
):
    """Normally distributed time steps (PTQ4DM, Shang et al. 2023, arXiv:2211.15736, Algorithm 1):

        i = clip(floor(n), 0, S - 1),  n ~ Normal(mean S, std S),  i the place in the chain from the image end

    What falls off the ends is clipped to them, or with `resample` drawn again.

    `pairing: legacy` is the released code's mistake: the number drawn counts iterations from the
    noisy end, the sample is the state after that iteration, and the network is told that count
    instead of a step of the schedule."""
    if std <= 0 or pairing not in ("correct", "legacy"):
        raise ValueError(
            f"builder 'normal' has std {std} and pairing '{pairing}'; it takes a std above 0 and "
            "pairing "
            "correct or legacy"
        )
    ends = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / std
    low, high = torch.special.ndtr(ends).tolist() if resample else (0, 1)
    place = chain_index(mean + std * between_quantiles(low, high, num_samples, rng), num_steps)
    image = in_turn(num_samples, num_images)
    return (
        (num_steps - 1 - place, image)
        if pairing == "correct"
        else (place + 1, image, place.float())
    )


def half_normal(num_steps, num_images, num_samples, rng, features, *, std=0.3):
    """|Normal(0, std)| as a fraction of the chain from the image end, clipped to the noisy end
    (iszry/HKU_2023_Summer_Research)."""
    place = chain_index(std * between_quantiles(0.5, 1, num_samples, rng), num_steps)
    return num_steps - 1 - place, in_turn(num_samples, num_images)


def between_quantiles(low, high, num, rng):
    """`num` standard normal values between two of its quantiles."""
    return torch.special.ndtri(
        low + (high - low) * torch.rand(num, generator=rng, dtype=torch.float64)
    )


def chain_index(fraction, num_steps):
    return (fraction * num_steps).floor().clamp(0, num_steps - 1).long()


def at_each(steps, num_images):
    """All pairs of `steps` and the first images, where the image runs fastest."""
    return steps.repeat_interleave(num_images), torch.arange(num_images).repeat(len(steps))


def in_turn(num_samples, num_images):
    return torch.arange(num_samples) % num_images


BUILDERS = {
    "uniform": uniform,
    "quad": quad,
    "segments": segments,
    "random": random,
    "linspace": linspace,
    "normal": normal,
    "half_normal": half_normal,
    "tdac": tdac,
}


def check_builder(name, options):
    """Raises ValueError for an unknown builder or option."""
    if name not in BUILDERS:
        raise ValueError(unknown_word(f"calibration builder '{name}' is unknown", name, BUILDERS))
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    known = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
    check_options(f"calibration builder '{name}'", options, known)

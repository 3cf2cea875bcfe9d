"""Temporal distribution alignment calibration (EDA-DM, arXiv:2401.04585): steps whose features have
many neighbours (density) and differ most from the rest (variety) get more calibration samples.

Axes: S steps, n images (twice as many with guidance), C channels, h x w positions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from base.hooks import watching

MIDDLE_ATTENTION = ("mid.attn_1", "middle_block.1")  # of ddim/unet.py and ldm/unet.py
CHUNK = 2**16  # features that are widened to double precision at a time


@torch.no_grad()
def middle_features(
    model: Any, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what the middle attention of model.net reads when `model.eps` runs on x (S, n, C, H,
    W) at the steps t (S,) -> (S, n, C, h, w). Raises ValueError for a network without one."""
    modules = dict(model.net.named_modules())
    found = [name for name in MIDDLE_ATTENTION if name in modules]
    if not found:
        raise ValueError(
            "builder 'tdac' reads the input of the middle attention, but the network has no "
            f"module {' or '.join(MIDDLE_ATTENTION)}; choose another calibration.builder"
        )
    device, seen = next(model.net.parameters()).device, []

    def note(_, inputs):
        seen.append(inputs[0].float().cpu())

    with watching(model.net, {found[0]: note}, before=True):
        for x_t, step in zip(x, t.float().to(device)):
            model.eps(x_t.to(device), step.expand(len(x_t)), cond)
    return torch.stack(seen)


def tdac(
    num_steps: int,
    num_images: int,
    num_samples: int,
    rng: torch.Generator,
    features: Callable[[], torch.Tensor],
    *,
    lamda: float = 1.2,
    radius: float = 3.0,
    least: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A calibration builder (see quant/calibration/builders.py): each image at one step, the images
    in turn. Weight of a step = density + `lamda` * variety, both rescaled to [0, 1]. As released:
    `lamda` 1.2 and `radius` 3.0 for CIFAR-10 and ImageNet, 1.0 and 0.3 for LSUN, 5.0 and 0.3 for
    COCO. Every step has `least` samples before the others are shared out: scales of every step
    (segments: per_step) need one."""
    if lamda < 0 or not 0 <= least * num_steps <= num_samples:
        raise ValueError(
            f"builder 'tdac' has lamda {lamda} and least {least}; lamda must not be negative, "
            f"least 0 to {num_samples // num_steps} ({num_samples} samples, {num_steps} steps)"
        )
    found = features()
    weight = rescaled(density(found, radius)) + lamda * rescaled(variety(found))
    counts = apportion(weight, num_samples - least * num_steps) + least
    step = torch.arange(num_steps).repeat_interleave(counts)
    return step[torch.randperm(num_samples, generator=rng)], torch.arange(num_samples) % num_images


def density(features: torch.Tensor, radius: float) -> torch.Tensor:
    """Returns D_i = #{j != i : mean (f_i - f_j)^2 <= radius}, (S,) double."""
    products = gram(features.flatten(1))
    squares = products.diagonal()
    distances = (squares[:, None] + squares - 2 * products) / features[0].numel()
    return (distances <= radius).sum(1).double() - 1


def variety(features: torch.Tensor) -> torch.Tensor:
    """Returns V_i = sum over j != i, images and positions of 1 - cos(f_i, f_j), the cosine along
    the channels; (S,) double."""
    cosines = gram(F.normalize(features, dim=2, eps=1e-6).flatten(1))
    positions = features[0].numel() // features.shape[2]
    return (len(features) - 1) * positions - (cosines.sum(1) - cosines.diagonal())


def gram(rows: torch.Tensor) -> torch.Tensor:
    """Returns the inner products of rows (S, features) -> (S, S) double."""
    return sum(part.double() @ part.double().T for part in rows.split(CHUNK, dim=1))


def rescaled(values: torch.Tensor) -> torch.Tensor:
    """Moves values linearly to [0, 1]; zeros where all are equal."""
    span = values.max() - values.min()
    return (values - values.min()) / span if span > 0 else torch.zeros_like(values)


def apportion(weight: torch.Tensor, num: int) -> torch.Tensor:
    """Shares out `num` samples in proportion to weight (S,) -> counts (S,): rounded, then what is
    missing is added to the largest counts, what is too much taken from the last positive ones.
    Without any weight all steps get equally many."""
    share = weight / weight.sum() if weight.sum() > 0 else torch.full_like(weight, 1 / len(weight))
    counts = (num * share).round().long()
    missing = num - int(counts.sum())
    if missing >= 0:
        counts[counts.argsort(descending=True, stable=True)[:missing]] += 1
    else:
        counts[counts.nonzero().flatten().flip(0)[:-missing]] -= 1
    return counts

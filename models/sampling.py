"""Images drawn from a model, and the trajectories that lead to them.

Axes: N images, C channels, H x W pixels. A model is a models.diffusion.DiffusionModel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from base.devices import exact_arithmetic
from base.errors import unknown_word
from ddim.sampler import SAMPLERS, STOCHASTIC, nothing, num_evaluations
from ddim.schedule import Schedule, step_sequence

if TYPE_CHECKING:
    from models.diffusion import DiffusionModel


@dataclass
class Sampling:
    """How images are drawn: `sampler` and `skip` are words of ddim.sampler and ddim.schedule, `eta`
    scales the noise of stochastic samplers."""

    sampler: str = "ddim"  # ddim | ddpm | plms | dpm_solver[_pp]_2m | dpm_solver[_pp]_3s
    steps: int = 100  # that the sampler visits
    skip: str = "quad"  # where these lie: a word of ddim.schedule.STEPS, or counts
    eta: float = 0.0  # noise that stochastic samplers add: 0 none, 1 that of DDPM
    seed: int = 0  # of the images
    batch_size: int = 64  # images at a time
    num: int = 256  # images 0 .. num-1 of the seed
    classes: list[int] = field(default_factory=list)  # in turn; [] draws one for each image
    prompts: str = ""  # file of prompts, in turn: one a line, or COCO captions .json

    def sequence(self, schedule: Schedule) -> list[int]:
        """The ascending steps of a schedule that the sampler visits."""
        return step_sequence(self.skip, self.steps, schedule)

    def num_evaluations(self, schedule: Schedule) -> int:
        """How often the sampler runs the network for a batch."""
        return num_evaluations(self.sampler, self.sequence(schedule))


@exact_arithmetic()
@torch.no_grad()
def sample(
    model: DiffusionModel, indices: Iterable[int], sampling: Sampling, **hooks: Callable
) -> torch.Tensor:
    """Draws the images number `indices` of `sampling.seed`; returns them as (N, 3, H, W) uint8.

    The row in a batch can change the last bit of a float result. Therefore whole blocks of images
    kB ... kB+B-1 run, where B is `sampling.batch_size`, and what was not asked for is dropped:
    image i always runs in row i % B beside the same neighbours, and has the same bytes in any run.
    `hooks` are `eps`, `start` and `callback` of `denoise`, which runs once for every block."""
    indices, size, images = list(indices), sampling.batch_size, {}
    for block in sorted({i // size for i in indices}):
        batch = range(block * size, (block + 1) * size)
        decoded = model.decode(denoise(model, batch, sampling, **hooks))
        images |= {i: decoded[i - batch.start] for i in indices if i in batch}
    return torch.stack([images[i] for i in indices])


def denoise(
    model: DiffusionModel,
    batch: Iterable[int],
    sampling: Sampling,
    *,
    eps: Callable | None = None,
    start: Callable | None = None,
    callback: Callable = nothing,
    differentiable: bool = False,
) -> torch.Tensor:
    """Runs the sampler for the images `batch` of `sampling.seed`; returns x_0 (N, C, H, W), not
    decoded.

    `eps(x, t, cond)` stands for `model.eps`; a correction of the model goes to samplers that take
    one. `start(batch)` gives (x (N, C, H, W), number of last steps to do from there) in place of
    the images' noise and all steps. `callback` is the sampler's. `differentiable` asks for the
    gradient of x_0 by whatever the network computes on the way, whose activations are then computed
    twice and held for one step. Raises ValueError where x_0 is not finite."""
    if sampling.sampler not in SAMPLERS:
        word = sampling.sampler
        raise ValueError(unknown_word(f"sampler '{word}' is unknown", word, SAMPLERS))
    eps, steps = eps or model.eps, sampling.sequence(model.schedule)
    noise, cond = model.noise(sampling.seed, batch), model.labels(sampling.seed, batch)
    correction = {"correction": model.correction} if sampling.sampler in STOCHASTIC else {}
    x = noise.draw()
    if start is not None:  # the first noise is drawn all the same: those of the steps stay the same
        x, count = start(batch)
        steps = steps[:count]

    def network(x, t):
        if differentiable:
            return checkpoint(eps, x, t, cond, use_reentrant=False)
        return eps(x, t, cond)

    options = {"noise": noise.draw, "eta": sampling.eta, "callback": callback, **correction}
    x.requires_grad_(differentiable)
    x = SAMPLERS[sampling.sampler](network, x, steps, model.schedule, **options)
    if not torch.isfinite(x).all():
        raise ValueError(
            f"sampling of {model.name} ended in NaN or infinite values; "
            "with quantized weights use more bits or more calibration data"
        )
    return x


@torch.no_grad()
def trajectory(
    model: DiffusionModel, sampling: Sampling, num_images: int, seed: int
) -> Iterator[tuple]:
    """Samples images 0 .. num_images-1 of `seed`, batch by batch; yields (step, t, x, cond, eps) of
    every evaluation of the network. What a batch leaves waits outside of the accelerator."""
    sampling = replace(sampling, seed=seed)
    for batch in _batches(num_images, sampling.batch_size):
        seen = []

        def keep(step, t, x, eps, *_):
            seen.append((step, t, x.cpu(), eps.cpu()))

        denoise(model, batch, sampling, callback=keep)
        cond = model.labels(seed, batch)
        for step, t, x, eps in seen:
            yield step, t, x.to(model.device), cond, eps.to(model.device)


def differentiable(
    model: DiffusionModel, sampling: Sampling, num_images: int, seed: int, max_batch: int
) -> Iterator[torch.Tensor]:
    """Samples images 0 .. num_images-1 of `seed` in batches of at most `max_batch`; yields x_0 (N,
    C, H, W) of each with the gradient by all that the network computes."""
    sampling = replace(sampling, seed=seed)
    for batch in _batches(num_images, min(sampling.batch_size, max_batch)):
        yield denoise(model, batch, sampling, differentiable=True)


def _batches(num_images: int, size: int) -> Iterator[range]:
    for first in range(0, num_images, size):
        yield range(first, min(first + size, num_images))

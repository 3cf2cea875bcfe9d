"""Full-precision trajectories that calibration data are picked from, kept in folders that runs
share.

Axes: B images of a batch, S evaluations of the network, C channels, H x W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from base.files import load_tensors, save_tensors
from base.seeds import mix
from base.workers import agreed, part_of, wait
from ddim.sampler import num_evaluations
from models.data import load_images
from models.diffusion import DECODED_AT_ONCE, DiffusionModel
from models.sampling import denoise
from tinydm.identity import folder_name, images_of

if TYPE_CHECKING:
    from tinydm.recipe import RunConfig

SEED_OFFSET = 2**33  # added to the seed: draws that no trajectory of the same seed makes


def visited_steps(model: DiffusionModel, config: RunConfig, start: str) -> list[int]:
    """Ascending steps of the trajectories: all from noise, else a share, calibration.start_step."""
    steps = config.sampling.sequence(model.schedule)
    share = 1 if start == "normal" else config.calibration.start_step
    return steps[: max(1, round(share * len(steps)))]


@torch.no_grad()
def record(
    model: DiffusionModel, config: RunConfig, start: str, folder: Path
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Records full-precision trajectories of `calibration.images` images.

    Returns x (S + 1, B, C, H, W) of each batch: what the network read at its S evaluations,
    noisiest first, and the clean image predicted at the last; and t (S,). Every finished batch is a
    file below `folder`, mapped into memory and read where it is touched. Several workers share the
    batches."""
    calibration, size = config.calibration, config.sampling.batch_size
    sampling = replace(config.sampling, seed=calibration.seed)
    steps = visited_steps(model, config, start)
    content, clean = STARTS[start](model, config, folder)
    content |= images_of(config, model, calibration.seed) | {"start": start, "visited": steps}
    shared = folder / folder_name("trajectory", content)
    firsts = range(0, calibration.images, size)
    paths = {first: shared / f"{first:06d}.safetensors" for first in firsts}
    todo = part_of(agreed([first for first, path in paths.items() if not path.exists()]))

    def begin(batch):
        return diffuse(model, calibration.seed, clean(batch), batch, steps[-1]), len(steps)

    total = len(todo) * num_evaluations(sampling.sampler, steps)
    with tqdm(desc="calibrate: full-precision trajectories", total=total, unit="step") as bar:
        for first in todo:
            states, times = [], []

            def note(step, t, x, eps, x0, *_):
                states[-1:] = [x.cpu(), x0.cpu()]  # of the clean images only the last one stays
                times.append(t)
                bar.update()

            batch = range(first, first + size)
            denoise(model, batch, sampling, start=clean and begin, callback=note)
            save_tensors(paths[first], {"x": torch.stack(states), "t": torch.tensor(times)}, {})
    wait()
    parts = [load_tensors(path)[0] for path in paths.values()]
    return [part["x"] for part in parts], parts[0]["t"]


# A function of STARTS takes (model, config, folder) and returns what decides the clean images that
# trajectories begin in, beside the recipe, and clean(batch) -> x (B, C, H, W), or None for noise.
Start = tuple[dict[str, Any], Callable[[range], torch.Tensor] | None]


def start_in_noise(model: DiffusionModel, config: RunConfig, folder: Path) -> Start:
    """Begins in pure noise."""
    return {}, None


def start_in_data(model: DiffusionModel, config: RunConfig, folder: Path) -> Start:
    """Begins in real images, I2N (repository iszry/HKU_2023_Summer_Research): image i is drawn from
    calibration.data by (seed, i); its class need not be the condition of trajectory i."""
    c, whole = config.calibration, config.sampling.batch_size
    size = model.shape[-1] * (model.first_stage.downsampling if model.first_stage else 1)
    wanted = range(-(-c.images // whole) * whole)  # trajectories run in whole batches

    def choose(count):
        return [mix(c.seed + SEED_OFFSET, i) % count for i in wanted]

    images, _ = load_images(c.data, size=size, choose=choose)

    def clean(batch):
        return encode(model, images[batch.start : batch.stop])

    return {"data": hashlib.sha256(images.numpy()).hexdigest()}, clean


def start_in_samples(model: DiffusionModel, config: RunConfig, folder: Path) -> Start:
    """Begins in the model's own images, DI2N (the same repository): image i of the model's own
    sampler (its README has DDIM) under the condition of trajectory i. The released code takes the
    state after the second step instead, which is still noise."""
    batches, _ = record(model, config, "normal", folder)
    return {}, lambda batch: batches[batch.start // len(batch)][-1].to(model.device)


STARTS = {"normal": start_in_noise, "i2n": start_in_data, "di2n": start_in_samples}


def encode(model: DiffusionModel, images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) uint8 -> clean x (B, C, H, W): pixels in [-1, 1] or scaled latents."""
    x = images.to(model.device) / 127.5 - 1
    if model.first_stage is None:
        return x
    latents = [model.first_stage.encode(part) for part in x.split(DECODED_AT_ONCE)]
    return torch.cat(latents) * model.scale_factor


def diffuse(
    model: DiffusionModel, seed: int, x0: torch.Tensor, batch: range, step: int
) -> torch.Tensor:
    """Diffuses clean x0 of the images `batch` to a step: sqrt(abar) x0 + sqrt(1 - abar) eps (Ho et
    al. 2020, Eq. 4), with a stream of eps of their own."""
    level = model.schedule.level(step)
    eps = model.noise(seed + SEED_OFFSET, batch).draw()
    return level**0.5 * x0 + (1 - level) ** 0.5 * eps

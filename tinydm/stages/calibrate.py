"""Collect calibration data in a new run folder:

    python scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml \\
        configs/method/METHOD.yaml [configs/preset/demo.yaml] out=RUN [key=value ...]

Writes RUN/config.yaml (the resolved recipe) and RUN/calibration.safetensors, picked from
full-precision trajectories. These stay in a folder trajectory-* beside RUN, shared by all runs of
the same model, weights, sampler, calibration.seed and calibration.start. Started again it goes on.

calibration.start says where trajectories begin: `normal`, in noise; `i2n`, in real images
(calibration.data) diffused to the first step; `di2n`, in the model's own samples diffused to it.
calibration.start_step=0.5 begins half way down the chain. At its noisy end the level abar, the
share of the image, is 1.5e-10 (cosine, 4000 steps), 4.0e-5 (linear, 1000 steps), 1.4e-4 (latent
diffusion; church 6.7e-4), 4.7e-3 (Stable Diffusion): there the difference from `normal` is nil for
most."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from base.config import split_arguments
from base.workers import agreed, is_first
from ddim.sampler import num_evaluations
from models.diffusion import DiffusionModel
from quant.calibration.builders import BUILDERS
from quant.calibration.dataset import CalibrationSet, pick
from quant.calibration.files import load_calibration
from quant.calibration.tdac import middle_features
from tinydm.recipe import RunConfig
from tinydm.run_folder import Run, create
from tinydm.stages.trajectories import record, visited_steps


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    print(calibrate(create(*split_arguments(arguments))))


def calibrate(run: Run) -> str:
    """Collects the calibration set of a run folder; returns what was done as a sentence."""
    path = run.path("calibration.safetensors")
    if agreed(path.exists() and not run.config.force):
        return f"calibrate: done already, {path}"
    with run.stage("calibrate"):
        calibration = collect(run.model, run.config, run.folder.parent)
        if is_first():
            calibration.save(path)
    num_steps = len(calibration.t.unique())
    return f"calibrate: {len(calibration)} samples at {num_steps} steps in {path}"


def collect(model: DiffusionModel, config: RunConfig, folder: Path | None = None) -> CalibrationSet:
    """Reads the set of calibration.file or collects one along full-precision trajectories, which
    are kept in `folder` if one is given. Raises ValueError for a set of another model."""
    with TemporaryDirectory() as scratch:
        if config.calibration.file:
            calibration = load_calibration(config.calibration.file)
        else:
            calibration = _pick_samples(model, config, folder or Path(scratch))
    check_fits(calibration, model)
    return calibration


def check_fits(calibration: CalibrationSet, model: DiffusionModel) -> None:
    """Raises ValueError for a set of other shapes, or with conditions where the model has none."""
    shape = tuple(calibration.x.shape[1:])
    if shape != model.shape:
        raise ValueError(
            f"calibration samples are {shape}, {model.name} takes {model.shape}; make the set "
            "with this model"
        )
    if (calibration.cond is None) != (model.condition is None):
        there, wanted = ("without", "with") if calibration.cond is None else ("with", "without")
        raise ValueError(
            f"calibration samples come {there} conditions, {model.name} is a model {wanted}; make "
            "the set with this model"
        )


def _pick_samples(model, config, folder):
    """Asks the builder before anything is recorded, so that it complains early."""
    c, sampling = config.calibration, config.sampling
    num_steps = num_evaluations(sampling.sampler, visited_steps(model, config, c.start))

    def features():
        batches, t = record(model, config, c.start, folder)
        num = min(c.images, sampling.batch_size)
        return middle_features(model, batches[0][:-1, :num], t, model.labels(c.seed, range(num)))

    build, rng = BUILDERS[c.builder], torch.Generator().manual_seed(c.seed)
    pairs = build(num_steps, c.images, c.steps * c.images, rng, features, **c.options)
    asked = {"cond": model.labels(c.seed, range(c.images)), "null": model.null_label()}
    asked = {key: None if value is None else value.cpu() for key, value in asked.items()}
    made = {
        "builder": c.builder,
        "model": config.name,
        "weights_hash": model.weights_hash,
        "calibration": vars(c),
        "sampling": vars(sampling),
    }
    return pick(*record(model, config, c.start, folder), pairs, **asked, made=made)

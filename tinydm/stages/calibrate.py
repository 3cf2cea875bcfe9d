"""Collect calibration data in a new run folder:

    python scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml
    configs/method/METHOD.yaml \\
        [configs/preset/demo.yaml] out=RUN [key=value ...]

Writes RUN/config.yaml (the resolved recipe) and RUN/calibration.safetensors, picked from
full-precision trajectories. These stay in a folder trajectory-* beside RUN, shared by all runs of
the same model, weights, sampler, calibration.seed and calibration.start. Started again it goes on.

calibration.start says where trajectories begin: `normal`, in noise; `i2n`, in real images
(calibration.data) diffused to the first step; `di2n`, in the model's own samples diffused to it.
calibration.start_step=0.5 begins half way down the chain. At its noisy end the level abar, the
share of the image, is 1.5e-10 (cosine, 4000 steps), 4.0e-5 (linear, 1000 steps), 1.4e-4 (latent
diffusion; church 6.7e-4), 4.7e-3 (Stable Diffusion): there the difference from `normal` is nil for
most. """

import hashlib
import json
from dataclasses import replace

import torch
from tqdm import tqdm

from base.config import split_arguments
from base.files import load_tensors, save_tensors
from base.seeds import mix
from ddim.sampler import num_evaluations
from ddim.schedule import step_sequence
from models.data import load_images
from models.diffusion import DECODED_AT_ONCE
from models.sampling import sample
from quant.calibration.builders import BUILDERS
from quant.calibration.dataset import pick
from quant.calibration.files import load_calibration
from quant.calibration.tdac import middle_features
from tinydm.run_folder import create, facts_of_images

# added to the seed: draws that no trajectory of the same seed makes
OWN = 2**33


def run(arguments):
    calibrate(create(*split_arguments(arguments)))


def calibrate(run):
    config, path = run.config, run.path("calibration.safetensors")
    if path.exists() and not config.force:
        print(f"calibrate: done already, {path}")
        return
    with run.stage("calibrate"):
        calibration = (
            load_calibration(config.calibration.file) if config.calibration.file else collect(run)
        )
        if tuple(calibration.x.shape[1:]) != run.model.shape:
            raise ValueError(
                f"calibration samples are {tuple(calibration.x.shape[1:])}, {config.name} takes "
                f"{run.model.shape}; make the set with this model"
            )
        if (calibration.cond is None) != (run.model.condition is None):
            there, wanted = ("without", "with") if calibration.cond is None else ("with", "without")
            raise ValueError(
                f"calibration samples come {there} conditions, {config.name} is a model {wanted}; "
                "make "
                "the set with this model"
            )
        calibration.save(path)
    print(f"calibrate: {len(calibration)} samples at {len(calibration.t.unique())} steps in {path}")


def collect(run):
    """The set that the builder picks from the trajectories. A builder is asked before anything is
    recorded, so that it complains early."""
    c, sampling, model = run.config.calibration, run.config.sampling, run.model
    num_steps = num_evaluations(sampling.sampler, visited(run, c.start))

    def features():
        batches, t = record(run, c.start)
        num = min(c.images, sampling.batch_size)
        return middle_features(model, batches[0][:-1, :num], t, model.labels(c.seed, range(num)))

    pairs = BUILDERS[c.builder](
        num_steps,
        c.images,
        c.steps * c.images,
        torch.Generator().manual_seed(c.seed),
        features,
        **c.options,
    )
    cond, null = (
        each if each is None else each.cpu()
        for each in (model.labels(c.seed, range(c.images)), model.null_label())
    )
    made = {
        "builder": c.builder,
        "model": run.config.name,
        "weights_hash": model.weights_hash,
        "calibration": vars(c),
        "sampling": vars(sampling),
    }
    return pick(*record(run, c.start), pairs, cond=cond, null=null, made=made)


def visited(run, start):
    """Ascending steps of the trajectories: the whole chain from noise, or the share of it that
    start_step says."""
    s, c = run.config.sampling, run.config.calibration
    steps = step_sequence(s.skip, s.steps, run.model.schedule)
    return steps if start == "normal" else steps[: max(1, round(c.start_step * len(steps)))]


def record(run, start):
    """Full-precision trajectories of `calibration.images` images -> x (S + 1, B, C, H, W) of each
    batch: what the network read at its S evaluations, noisiest first, and the clean image predicted
    at the last; t (S,). Every finished batch is a file of the shared folder, mapped into memory and
    read where it is touched."""
    c, s, steps = run.config.calibration, run.config.sampling, visited(run, start)
    decided_by, clean = STARTS[start](run)
    folder = trajectory_folder(run, decided_by | {"start": start, "visited": steps})
    paths = {
        first: folder / f"{first:06d}.safetensors" for first in range(0, c.images, s.batch_size)
    }
    todo = [first for first, path in paths.items() if not path.exists()]
    # nobody looks at the images: nothing to decode
    latent = replace(run.model, first_stage=None)
    with tqdm(
        total=len(todo) * num_evaluations(s.sampler, steps),
        unit="step",
        desc="calibrate: full-precision trajectories",
    ) as bar:
        for first in todo:
            batch, states, times = range(first, first + s.batch_size), [], []

            def note(step, t, x, eps, x0, *_):
                # of the clean images only the last one stays
                states[-1:] = [x.cpu(), x0.cpu()]
                times.append(t)
                bar.update()

            begin = (
                None
                if clean is None
                else (diffused(run, clean(batch), batch, steps[-1]), len(steps))
            )
            sample(
                latent,
                run.model.eps,
                batch,
                sampler=s.sampler,
                steps=s.steps,
                skip=s.skip,
                eta=s.eta,
                seed=c.seed,
                batch_size=s.batch_size,
                start=begin,
                callback=note,
            )
            save_tensors(paths[first], {"x": torch.stack(states), "t": torch.tensor(times)}, {})
    parts = [load_tensors(path)[0] for path in paths.values()]
    return [part["x"] for part in parts], parts[0]["t"]


def trajectory_folder(run, facts):
    """The shared folder of the trajectories, named by what decides their bytes."""
    facts |= facts_of_images(run) | {"seed": run.config.calibration.seed}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return run.folder.parent / f"trajectory-{key}"


def pure_noise(run):
    return {}, None


def real_images(run):
    """I2N (repository iszry/HKU_2023_Summer_Research): image i is drawn from calibration.data by
    (seed, i); its class need not be the condition of trajectory i."""
    c, model, whole = run.config.calibration, run.model, run.config.sampling.batch_size
    size = model.shape[-1] * (model.first_stage.downsampling if model.first_stage else 1)
    wanted = range(-(-c.images // whole) * whole)  # trajectories run in whole batches
    images, _ = load_images(
        c.data, size=size, choose=lambda count: [mix(c.seed + OWN, i) % count for i in wanted]
    )

    def clean(batch):
        return encode(model, images[batch.start : batch.stop])

    return {"data": hashlib.sha256(images.numpy()).hexdigest()}, clean


def own_images(run):
    """DI2N (the same repository): image i of the model's own sampler (its README has DDIM) under
    the condition of trajectory i. The released code takes the state after the second step instead,
    which is still noise."""
    batches, _ = record(run, "normal")
    return {}, lambda batch: batches[batch.start // len(batch)][-1].to(run.model.device)


STARTS = {"normal": pure_noise, "i2n": real_images, "di2n": own_images}


def encode(model, images):
    """Images (N, 3, H, W) uint8 -> clean x (N, C, H, W) of the model: pixels in [-1, 1] or scaled
    latents."""
    x = images.to(model.device) / 127.5 - 1
    if model.first_stage is None:
        return x
    return (
        torch.cat([model.first_stage.encode(part) for part in x.split(DECODED_AT_ONCE)])
        * model.scale_factor
    )


def diffused(run, x0, batch, step):
    """Clean x0 of the images `batch` at a step: sqrt(abar) x0 + sqrt(1 - abar) eps (Ho et al. 2020,
    Eq. 4), with a stream of eps of their own."""
    level = run.model.schedule.level(step)
    eps = run.model.noise(run.config.calibration.seed + OWN, batch).draw()
    return level**0.5 * x0 + (1 - level) ** 0.5 * eps

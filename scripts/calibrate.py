"""Collect calibration data in a new run folder:

    python scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml configs/method/METHOD.yaml \\
        [configs/preset/demo.yaml] out=RUN [key=value ...]

Writes RUN/config.yaml (the resolved recipe) and RUN/calibration.safetensors. Started again it goes on.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

from models.diffusion import sample  # noqa: E402
from quant.calibration import BUILDERS, load_calibration, with_condition  # noqa: E402
from quant.files import load_tensors, save_tensors  # noqa: E402
from scripts.cli import main  # noqa: E402
from scripts.run_folder import create, split_arguments  # noqa: E402


def run(arguments):
    calibrate(create(*split_arguments(arguments)))


def calibrate(run):
    config, path = run.config, run.path("calibration.safetensors")
    if path.exists() and not config.force:
        print(f"calibrate: done already, {path}")
        return
    with run.stage("calibrate"):
        if config.calibration.file:
            calibration = load_calibration(config.calibration.file)
        else:
            made = {"builder": config.calibration.builder, "model": config.name, "weights_hash": run.model.weights_hash,
                    "calibration": vars(config.calibration), "sampling": vars(config.sampling)}
            calibration = BUILDERS[config.calibration.builder](record(run), config.calibration.steps,
                                                               config.calibration.images, made)
            cond = run.model.labels(config.calibration.seed, range(config.calibration.images))
            if cond is not None:
                calibration = with_condition(calibration, cond.cpu(), run.model.null_label())
        if tuple(calibration.x.shape[1:]) != run.model.shape:
            raise ValueError(f"calibration samples are {tuple(calibration.x.shape[1:])}, {config.name} takes "
                             f"{run.model.shape}; make the set with this model")
        calibration.save(path)
    run.finish("calibrate")
    print(f"calibrate: {len(calibration)} samples at {len(calibration.t.unique())} steps in {path}")


def record(run):
    """Full-precision trajectories of `calibration.images` images -> [(x, t)] per sampling step, noisiest first. Each
    finished batch of images is kept in resume/calibrate."""
    c, s = run.config.calibration, run.config.sampling
    paths = {start: run.path(f"resume/calibrate/{start:06d}.safetensors") for start in range(0, c.images, s.batch_size)}
    todo = [start for start, path in paths.items() if not path.exists()]
    with tqdm(total=len(todo) * run.num_evaluations, desc="calibrate: full-precision trajectories", unit="step") as bar:
        for start in todo:
            steps = []

            def note(step, t, x, *_):
                steps.append((x.cpu(), t))
                bar.update()
            sample(run.model, run.model.eps, range(start, start + s.batch_size), sampler=s.sampler, steps=s.steps,
                   skip=s.skip, eta=s.eta, seed=c.seed, batch_size=s.batch_size, callback=note)
            tensors = {"x": torch.stack([x for x, _ in steps]), "t": torch.tensor([t for _, t in steps])}
            save_tensors(paths[start], tensors, {})
    parts = [load_tensors(path)[0] for path in paths.values()]
    x = torch.cat([p["x"] for p in parts], dim=1)[:, :c.images]
    return [(x[i], float(t)) for i, t in enumerate(parts[0]["t"])]


if __name__ == "__main__":
    main(run)

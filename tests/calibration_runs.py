"""What the tests of calibration share: the stage on the tiny model, and its trajectories."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from base.files import PROJECT
from models.diffusion import load_model
from models.sampling import Sampling, sample
from quant.calibration.files import load_calibration
from tinydm.stages import calibrate

WORDS = [
    "sampling.steps=5",
    "sampling.batch_size=4",
    "calibration.steps=2",
    "calibration.images=6",
    "device=cpu",
]


@pytest.fixture
def tiny_yaml(tiny_config, tmp_path):
    """The tiny model as a YAML."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_config))
    return tmp_path / "tiny.yaml"


def collect(model, out, *words, method="minmax"):
    """-> the set of a new run in the folder `out` beside the model."""
    out, configs = model.parent / out, PROJECT / "configs"
    calibrate.run(
        [
            str(model),
            f"{configs}/bits/w8a8.yaml",
            f"{configs}/method/{method}.yaml",
            *WORDS,
            f"out={out}",
            *words,
        ]
    )
    return load_calibration(out / "calibration.safetensors")


def folders(model):
    return sorted(model.parent.glob("trajectory-*"))


def trajectory(model_path, num=8, **how):
    """Full-precision images 0 .. num-1 of seed 1000 in batches of 4, observed: per step x, eps
    (num, ...) and t."""
    model, seen = load_model(yaml.safe_load(model_path.read_text()), device="cpu"), {}
    sample(
        model,
        range(num),
        Sampling(steps=5, skip="uniform", seed=1000, batch_size=4),
        callback=lambda step, t, x, eps, x0, _: seen.setdefault(step, []).append((x, eps, t)),
        **how,
    )
    return [
        (torch.cat([x for x, _, _ in parts]), torch.cat([e for _, e, _ in parts]), parts[0][2])
        for parts in seen.values()
    ]


@pytest.fixture
def grey_images(tmp_path):
    """A folder of four images of one grey level each."""
    (tmp_path / "data").mkdir()
    for i, level in enumerate((10, 60, 160, 250)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"data/{i}.png")
    return tmp_path / "data"

"""What the tests of training share: a short recipe, a module, images, and a death in between."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from conftest import TINY

from tinydm.training.diffusion import DiffusionTraining

STEPS = 4  # of an epoch


@dataclass
class Recipe:
    """Eleven optimizer steps on the CPU, in epochs of 4, 4 and 3."""

    num_images: int = 11 * 4
    batch_size: int = 4
    steps_per_epoch: int = STEPS
    lr: float = 1e-2
    beta2: float = 0.99
    weight_decay: float = 0.0
    warmup_steps: int = 3
    grad_clip: float = 1.0
    ema_decay: float = 0.9
    precision: str = "32-true"
    compile: bool = False
    sample_every: int = 100
    seed: int = 5
    device: str = "cpu"


def make(**changes):
    torch.manual_seed(0)
    sampling = {"sampler": "ddpm", "skip": "quad", "steps": 2, "eta": 1.0}
    return DiffusionTraining(
        {"network": TINY, "schedule": {}, "sampling": sampling}, Recipe(**changes)
    )


def images(num=10):
    return torch.randint(
        0, 256, (num, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8
    ), torch.arange(num)


class Killed(Exception):
    pass


@contextmanager
def killed_training(after):
    """While inside, a diffusion training dies when `after` optimizer steps are done; that it does
    is checked."""
    count, step = [0], DiffusionTraining.training_step

    def dying_step(self, *arguments):
        if count[0] == after:
            raise Killed
        count[0] += 1
        return step(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DiffusionTraining, "training_step", dying_step)
        yield

"""What the tests of the noise correction share: a correction of random tables, and a job after the
pass on the tiny model."""

from functools import partial

import pytest
import torch
from tiny import make_job, normal, rules

from models.sampling import Sampling, trajectory
from quant.network import Correction
from quant.passes.correct_noise import correct_noise
from quant.passes.fit_ranges import fit_ranges

TIMES = torch.tensor([0.0, 10.0, 30.0, 100.0])
STEPS = {"steps": 4, "skip": "uniform", "sampler": "ddim", "eta": 1.0}


def filled(times=TIMES, *size):
    """A correction of random tables."""
    correction = Correction(times, 3, *size)
    for i, table in enumerate(
        (correction.slope, correction.rows, correction.columns, correction.variance)
    ):
        table.copy_(0.1 * normal(*table.shape, seed=i).abs())
    return correction


@pytest.fixture(params=[{}, {"slope": "signed", "per": "line", "variance": False}])
def corrected(request, tiny_model, tmp_path):
    """A job on the tiny model after the pass, and its facts."""
    sampling = Sampling(**STEPS, batch_size=3)
    job = make_job(
        tiny_model.net, tmp_path, rules(3, 4), trajectory=partial(trajectory, tiny_model, sampling)
    )
    job.model = tiny_model
    fit_ranges(job)
    job.correct = partial(correct_noise, job, num_images=8, seed=5, **request.param)
    return job, job.correct()

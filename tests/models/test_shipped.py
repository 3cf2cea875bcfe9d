"""What must hold on a trained network: the small latent model that ships."""

from dataclasses import asdict

import pytest
import torch

from base.config import load
from base.files import PROJECT
from models.diffusion import load_model
from models.sampling import Sampling, sample
from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.graph import trace
from quant.passes.fit_ranges import fit_ranges
from quant.passes.job import Job
from quant.timeline import Timeline
from tinydm.recipe import RunConfig

ATTENTION = {"role": ["q", "k", "v", "qkv", "probs", "proj", "proj_in"]}


@pytest.fixture(scope="module")
def trained():
    """The model, and the inputs and outputs of its network along the sampler."""
    model = load_model(
        asdict(load(RunConfig, [PROJECT / "configs/model/latent-compact.yaml"])), device="cpu"
    )
    record = []
    with torch.no_grad():
        sample(
            model,
            range(4),
            Sampling(steps=8, skip="uniform", batch_size=4),
            callback=lambda step, t, x, eps, *_: record.append((x, t, eps)),
        )
    x, eps = (torch.cat([row[i] for row in record]) for i in (0, 2))
    return (
        model,
        CalibrationSet(x, torch.tensor([float(row[1]) for row in record]).repeat_interleave(4)),
        eps,
    )


def eps_error(trained, folder, attention, others):
    """Mean square error of eps over all steps, stem and out at 8 bits."""
    model, calibration, eps = trained
    rules = [
        {"weight": {"bits": bits, "per": "channel"}, "input": {"bits": bits}, **whose}
        for bits, whose in ((others, {}), (attention, ATTENTION), (8, {"role": ["stem", "out"]}))
    ]
    job = Job(
        model=model,
        net=convert(model.net, rules, Timeline()),
        calibration=calibration,
        resume_folder=folder,
        graph=trace(model.net, calibration.arguments(slice(0, 1))),
        rules=rules,
    )
    fit_ranges(job)
    with torch.no_grad():
        return float((job.net(*calibration.arguments(slice(None))) - eps).square().mean())


def test_bits_of_attention_and_of_convolutions_each_cost_what_they_cost(trained, tmp_path):
    """The four variants A to D: {4, 8} bits of attention x {4, 8} bits of all else."""
    error = {(a, c): eps_error(trained, tmp_path, a, c) for a in (4, 8) for c in (4, 8)}
    assert error[8, 8] < min(error[4, 8], error[8, 4])
    assert max(error[4, 8], error[8, 4]) < 1.1 * error[4, 4]

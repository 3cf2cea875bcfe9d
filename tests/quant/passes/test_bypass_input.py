"""The bypass of the input's rounding error: exact for a linear network, stored with the network,
refused in words."""

from types import SimpleNamespace

import pytest
import torch
from conftest import TINY
from tiny import facts_of, make_job, normal, rules, samples
from torch import nn

from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.convert import convert
from quant.passes.bypass_input import bypass_input
from quant.passes.fit_ranges import fit_ranges
from quant.passes.job import Job
from quant.passes.run import run_passes
from quant.timeline import Timeline

STEM_ONLY = [{"role": "stem", "input": {"bits": 3}}]


class Linear(nn.Module):
    """eps = A x, twice as much from step 500 on."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.conv.role = "stem"

    def forward(self, x, t):
        return self.conv(x) * (1 + (t >= 500).float())[:, None, None, None]


def linear_job(folder, boundaries=(500,), balance=None):
    torch.manual_seed(0)
    model = SimpleNamespace(net=Linear().requires_grad_(False))
    net = convert(
        model.net,
        [*STEM_ONLY, {"match": "*", "balance": balance is not None}],
        Timeline(boundaries),
    )
    if balance is not None:
        net.net.conv.balance(balance)
    job = Job(model=model, net=net, calibration=samples(40), graph=None, resume_folder=folder)
    fit_ranges(job)
    return job


@pytest.mark.parametrize("balance", [None, torch.tensor([0.5, 1.0, 3.0])])
def test_of_a_linear_network_the_gain_is_its_matrix_and_nothing_is_left_of_the_error(
    tmp_path, balance
):
    job = linear_job(tmp_path, balance=balance)
    x, t = normal(6, 3, 8, 8, seed=5), torch.tensor([900.0, 10, 600, 499, 500, 0])
    wanted = job.model.net(x, t)
    assert (job.net(x, t) - wanted).square().mean() > 1e-3
    (fact,) = bypass_input(job)
    matrix = job.model.net.conv.weight[:, :, 0, 0]
    assert torch.allclose(job.net.bypass.gain, torch.stack([matrix, 2 * matrix]), atol=1e-4)
    assert torch.allclose(job.net(x, t), wanted, atol=1e-4)
    assert fact["mse_after"] < 1e-6 < 1e-3 < fact["mse_before"]


def test_one_matrix_for_all_steps_is_their_least_squares_fit(tmp_path):
    """Alike many samples on either side of step 500, with errors that differ by chance alone."""
    job = linear_job(tmp_path, boundaries=())
    bypass_input(job)
    assert torch.allclose(
        job.net.bypass.gain[0], 1.5 * job.model.net.conv.weight[:, :, 0, 0], atol=0.1
    )


def test_an_input_that_is_not_quantized_adds_nothing(tmp_path):
    job = linear_job(tmp_path)
    bypass_input(job)
    x, t = normal(2, 3, 8, 8), torch.tensor([900.0, 10])
    job.net.net.conv.input_quantizer.enabled = False
    error = job.net.input_error(x)
    assert torch.equal(job.net.bypass(error), torch.zeros(2, 2, 8, 8))
    assert torch.allclose(job.net(x, t), job.model.net(x, t), atol=1e-6)


def test_it_lowers_the_error_of_a_network_and_comes_back_from_its_file(tiny_net, tmp_path):
    wanted = [
        {"match": "*", "weight": {"bits": 8, "per": "channel"}, "input": {"bits": 8}},
        {"role": "stem", "input": {"bits": 3}},
    ]
    job = make_job(tiny_net, tmp_path, wanted, num=40, boundaries=[500])
    (fact,) = facts_of("bypass_input", run_passes(job, ["fit_ranges", "bypass_input"]))
    assert fact["mse_after"] < fact["mse_before"]
    x, t = job.calibration.arguments(slice(0, 40))
    found = (job.net(x, t) - tiny_net(x, t)).square().mean()
    assert float(found) == pytest.approx(fact["mse_after"], rel=1e-3)
    recipe = {"name": "tiny", "network": TINY, "rules": wanted, "weights_hash": "0"}
    save_quantized(tmp_path / "q.safetensors", job.net, recipe)
    back = load_quantized(tmp_path / "q.safetensors", build_network)
    assert torch.equal(back(x, t), job.net(x, t)) and torch.equal(
        back.bypass.gain, job.net.bypass.gain
    )


def test_an_input_in_floating_point_needs_none(tiny_net, tmp_path):
    said = []
    job = make_job(tiny_net, tmp_path, rules(4, 32), log=said.append)
    assert facts_of("bypass_input", run_passes(job, ["fit_ranges", "bypass_input"])) == []
    assert "nothing needs to go around it" in said[-1] and job.net.bypass is None


def test_what_cannot_be_is_refused_in_words(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 8))
    with pytest.raises(ValueError, match="list it after fit_ranges"):
        bypass_input(job)
    job = make_job(tiny_net, tmp_path, rules(8, 8))
    run_passes(job, ["fit_ranges", "bypass_input"])
    with pytest.raises(ValueError, match="list bypass_input once"):
        bypass_input(job)

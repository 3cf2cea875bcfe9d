"""Errors weighed by what their spatial frequencies do to the image."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from tiny import make_job, normal, rules
from torch import nn

from models.diffusion import load_model
from models.sampling import Sampling, denoise, differentiable, sample
from quant.network import quant_layers
from quant.passes.fit_ranges import fit_ranges
from quant.passes.reconstruct import reconstruct
from quant.reconstruction.frequency import FrequencyFilter, as_maps, dct, gradient_energies, idct
from quant.reconstruction.loss import output_loss

STEPS = {"steps": 4, "skip": "uniform", "sampler": "ddim", "eta": 0.0}


def test_the_transform_is_scipys_and_its_inverse_brings_back():
    x = normal(2, 3, 6, 8)
    assert np.allclose(dct(x).numpy(), dctn(x.numpy(), axes=(2, 3), norm="ortho"), atol=1e-5)
    assert torch.allclose(idct(dct(x)), x, atol=1e-5)


def test_a_constant_map_is_its_first_coefficient_alone():
    coefficients = dct(torch.full((1, 1, 4, 4), 3.0))
    assert coefficients[0, 0, 0, 0] == pytest.approx(12.0)
    coefficients[0, 0, 0, 0] = 0
    assert coefficients.abs().max() < 1e-5


class MeansAlone(nn.Module):
    """A unit, of whose output nothing but the mean over the map goes on; and a vector and tokens on
    the way."""

    def __init__(self):
        super().__init__()
        self.unit, self.vector, self.tokens = nn.Conv2d(2, 2, 1), nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, t):
        h = self.unit(x)
        return (
            h.mean((2, 3), keepdim=True)
            + self.vector(h.mean((2, 3)))[:, :, None, None]
            + self.tokens(h.flatten(2).transpose(1, 2)).mean(1)[:, :, None, None]
            + 0 * x
        )


def job_of(net, times, size=4):
    """Whose sampler subtracts a tenth of the answer at every one of `times`."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)

    def differentiable(num_images, seed):
        x = normal(num_images, 2, size, size, seed=seed).requires_grad_(True)
        for t in times:
            x = x - 0.1 * net(x, torch.full((num_images,), t))
        yield x

    return SimpleNamespace(model=SimpleNamespace(net=net), seed=3, differentiable=differentiable)


def test_where_only_the_mean_goes_on_only_the_mean_counts():
    torch.manual_seed(0)
    filters = FrequencyFilter(job_of(MeansAlone(), [7.0, 3.0]), ["unit", "vector", "tokens"], 1.0)
    error, t = normal(3, 2, 4, 4, seed=1), torch.tensor([7.0, 3.0, 4.0])
    # all of the weight, 16, on one of 16
    wanted = 4 * error.mean((2, 3), keepdim=True).expand_as(error)
    assert torch.allclose(filters("unit", t, error), wanted, atol=1e-4)
    tokens = error.flatten(2).transpose(1, 2)
    assert torch.allclose(
        filters("tokens", t, tokens), wanted.flatten(2).transpose(1, 2), atol=1e-4
    )
    vector = normal(3, 2)
    assert filters("vector", t, vector) is vector


def test_power_zero_is_the_plain_error_and_powers_beyond_one_are_refused():
    error = normal(2, 2, 4, 4)
    plain = FrequencyFilter(job_of(MeansAlone(), [5.0]), ["unit"], 0.0)(
        "unit", torch.tensor([5.0, 5.0]), error
    )
    assert torch.allclose(plain, error, atol=1e-5)
    with pytest.raises(ValueError, match="frequency is 1.5; it must lie in 0 to 1"):
        FrequencyFilter(job_of(MeansAlone(), [5.0]), ["unit"], 1.5)


class Linear(nn.Module):
    """eps = a(t) times the circular convolution of x with [1, 1] / 2 along the rows."""

    def __init__(self):
        super().__init__()
        self.unit = nn.Identity()

    def forward(self, x, t):
        h = self.unit(x + 0.0)
        return t[:, None, None, None] * (h + h.roll(1, 2)) / 2


def test_energies_are_those_of_the_adjoint_by_hand():
    """x_0 = (I - 0.1 * 2 B)(I - 0.1 * 5 B) x: the gradient by the unit's output at the first of two
    steps is -0.5 B^T (I - 0.2 B)^T n, at the last one -0.2 B^T n."""
    torch.manual_seed(1)
    job = job_of(Linear(), [5.0, 2.0])
    found = gradient_energies(job, ["unit"])["unit"]
    n = normal(8, 2, 4, 4, seed=3)

    def transposed(x):
        return (x + x.roll(-1, 2)) / 2

    for t, gradient in (
        (2.0, -0.2 * transposed(n)),
        (5.0, -0.5 * transposed(n - 0.2 * transposed(n))),
    ):
        wanted = (
            torch.from_numpy(dctn(gradient.numpy(), axes=(2, 3), norm="ortho"))
            .square()
            .mean(1)
            .sum(0)
        )
        assert torch.allclose(found[t], wanted.float(), rtol=1e-4, atol=1e-6)


def test_times_between_the_samplers_take_the_nearest_and_neighbours_share_a_table():
    """40 steps: ten groups of four."""
    filters = FrequencyFilter(job_of(Linear(), [t / 10 for t in range(40, 0, -1)]), ["unit"], 1.0)
    assert filters.gains["unit"].shape == (10, 4, 4) and filters.group.tolist() == [
        i // 4 for i in range(40)
    ]
    assert torch.allclose(filters.gains["unit"].square().mean((1, 2)), torch.ones(10))
    error = normal(1, 2, 4, 4).expand(3, -1, -1, -1)
    first, second, other = filters("unit", torch.tensor([0.1, 0.44, 0.46]), error)
    assert torch.equal(first, second) and not torch.allclose(first, other)


def test_gradients_that_grow_beyond_all_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN or infinite on this sampler; set frequency: 0"):
        FrequencyFilter(job_of(Linear(), [float(t) for t in range(400, 0, -10)]), ["unit"], 1.0)


def test_tokens_of_no_square_map_have_no_frequencies():
    assert as_maps(torch.zeros(2, 6, 3)) is None and as_maps(torch.zeros(2, 3)) is None
    assert as_maps(torch.zeros(2, 9, 5)).shape == (2, 5, 3, 3)


@pytest.mark.parametrize(
    "sampler, eta", [("ddim", 0.0), ("ddpm", 1.0), ("plms", 0.0), ("dpm_solver_pp_2m", 0.0)]
)
def test_every_samplers_gradient_is_its_finite_difference(tiny_config, sampler, eta):
    """By the first layer's output, at the first of the steps alone."""
    model, first = load_model(tiny_config, device="cpu"), {}
    # where x_0 is clipped, a difference is no gradient
    model.schedule = replace(model.schedule, clip=False)
    wiggle = normal(1, *model.net.conv_in(torch.zeros(1, *model.shape)).shape[1:], seed=5)

    def x0(size=0.0, **options):
        calls = []

        def hook(module, arguments, out):
            calls.append(0)
            if len(calls) == 1:
                first["out"] = out
                return out + size * wiggle

        handle = model.net.conv_in.register_forward_hook(hook)
        try:
            skip = "time_uniform" if sampler.startswith("dpm") else "uniform"
            sampling = Sampling(sampler=sampler, steps=4, skip=skip, eta=eta)
            return denoise(model, range(1), sampling, **options).double()
        finally:
            handle.remove()

    n = normal(1, *model.shape, seed=9)
    with torch.no_grad():
        difference = float((n * (x0(1e-2) - x0(-1e-2))).sum()) / 2e-2
    with torch.enable_grad():
        total = (n * x0(differentiable=True)).sum()
        (gradient,) = torch.autograd.grad(total, [first["out"]])
    assert float((gradient * wiggle).sum()) == pytest.approx(difference, rel=2e-2, abs=1e-4)


def test_weighted_loss_by_hand():
    """Sum over channels, mean over samples and positions, of the filtered error's square: 16 times
    the means' square where the mean has all of the weight."""
    torch.manual_seed(0)
    filters = FrequencyFilter(job_of(MeansAlone(), [7.0]), ["unit"], 1.0)
    out, target, rows = normal(2, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2), torch.tensor([2, 0])
    unit = SimpleNamespace(
        device="cpu",
        saliency=None,
        frequency=lambda rows, error: filters("unit", torch.full((2,), 7.0), error),
    )
    expected = 16 * (out - target[rows]).mean((2, 3)).square().sum(1).mean()
    assert output_loss(unit, out, target, rows, 2.0) == pytest.approx(float(expected), rel=1e-4)


def test_reconstruction_by_frequencies_of_a_pretrained_model(tiny_model, tmp_path):
    """The pass with gradients of the very images that sampling draws, before they are decoded; the
    second time, with one unit learned anew, it ends in the same bytes."""
    sampling = Sampling(**STEPS, batch_size=8)
    draw = partial(differentiable, tiny_model, sampling, max_batch=3)
    with torch.enable_grad():
        x0 = torch.cat(list(draw(4, 5)))
    assert x0.requires_grad
    drawn = sample(tiny_model, range(4), Sampling(**STEPS, seed=5, batch_size=4)).float()
    assert (tiny_model.decode(x0.detach()).float() - drawn).abs().max() <= 1 and drawn.std() > 20
    learned = []
    for frequency in (0.5, 0.5, 0.0):
        folder = tmp_path / f"{frequency}"
        folder.mkdir(exist_ok=True)
        job = make_job(tiny_model.net, folder, rules(4, 4), differentiable=draw)
        job.model = tiny_model
        fit_ranges(job)
        reconstruct(
            job, joint=True, weight_iters=3, batch_size=4, weight_lr=0.5, frequency=frequency
        )
        learned.append([layer.weight_int.clone() for layer in quant_layers(job.net).values()])
        sorted(folder.glob("*.safetensors"))[-1].unlink()
    assert all(map(torch.equal, learned[0], learned[1])) and not all(
        map(torch.equal, learned[0], learned[2])
    )

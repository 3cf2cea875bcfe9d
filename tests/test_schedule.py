"""Betas, products and step sequences equal the recorded ones; impossible wishes end in a sentence."""
import numpy as np
import pytest
import torch

from conftest import read_fixture
from ddim.schedule import BETAS, make_schedule, step_sequence

META, _, TENSORS = read_fixture("schedules")


def betas_of(description):
    kind, timesteps = description["kind"], description["timesteps"]
    if "cosine" in kind:
        return BETAS["cosine"](timesteps)
    if kind == "improved linear":                         # the same line at any length: 0.1 / T to 20 / T
        return BETAS["linear"](timesteps, 0.1 / timesteps, 20 / timesteps)
    start = description.get("beta_start", description.get("linear_start"))
    end = description.get("beta_end", description.get("linear_end"))
    return BETAS["linear" if kind.startswith("sqrt_linear") else kind](timesteps, start, end)


@pytest.mark.parametrize("name", META["config"])
def test_betas_and_their_products(name):
    betas = betas_of(META["config"][name])
    recorded = TENSORS[f"{name}/betas"].numpy()
    assert np.abs(betas - recorded).max() <= META["tolerance"] * recorded.max()
    assert np.abs(np.cumprod(1 - betas) - TENSORS[f"{name}/alphas_cumprod"].numpy()).max() <= META["tolerance"]


@pytest.mark.parametrize("kind", ["linear", "quad"])
def test_pixel_schedule_multiplies_in_float32_and_ends_at_one(kind):
    schedule = make_schedule(kind=kind)
    recorded = TENSORS[f"pixel_{kind}_1000/alphas_cumprod_float32_product"]
    assert torch.equal(schedule.abar, recorded)
    assert schedule.level(-1) == 1.0 and schedule.level(999) == float(schedule.abar[999])


def test_latent_schedule_multiplies_in_float64_and_ends_at_its_first_level():
    schedule = make_schedule(kind="scaled_linear", beta_start=0.0015, beta_end=0.0195, space="latent")
    recorded = TENSORS["latent_linear_0.0015_0.0195/alphas_cumprod"].float()
    assert torch.equal(schedule.abar, recorded)
    assert schedule.level(-1) == float(recorded[0])


STEP_LISTS = [key for key in TENSORS if key.startswith("steps_")]


@pytest.mark.parametrize("key", STEP_LISTS)
def test_step_sequence(key):
    kind, count = key.split("/")
    _, space, skip = kind.split("_")
    assert step_sequence(skip, int(count), make_schedule(space=space)) == TENSORS[key].tolist()


@pytest.mark.parametrize("skip, count, space, word", [
    ("uniform", 0, "pixel", "0 sampling steps"), ("uniform", 1001, "pixel", "1001 sampling steps"),
    ("quadd", 10, "pixel", "'quadd'"), ("uniform", 27, "latent", "past the end"), ("uniform", 1000, "latent", "past")])
def test_impossible_step_sequence(skip, count, space, word):
    with pytest.raises(ValueError, match=word):
        step_sequence(skip, count, make_schedule(space=space))


def test_unknown_words_are_quoted():
    with pytest.raises(ValueError, match="'lin' is unknown; choose one of linear"):
        make_schedule(kind="lin")
    with pytest.raises(ValueError, match="'voxel' is unknown; choose pixel or latent"):
        make_schedule(space="voxel")

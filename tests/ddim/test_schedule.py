"""Betas, products and step sequences equal the recorded ones; impossible wishes end in a
sentence."""

import fixture_adapter_samplers
import numpy as np
import pytest
import torch
from conftest import read_fixture

from ddim.schedule import make_schedule, step_sequence

META, _, TENSORS = read_fixture("schedules")


@pytest.mark.parametrize("name", META["config"])
def test_betas_and_their_products(name):
    betas = fixture_adapter_samplers.schedule(name, META["config"][name])
    recorded = TENSORS[f"{name}/betas"].numpy()
    assert np.abs(betas - recorded).max() <= META["tolerance"] * recorded.max()
    assert (
        np.abs(np.cumprod(1 - betas) - TENSORS[f"{name}/alphas_cumprod"].numpy()).max()
        <= META["tolerance"]
    )


@pytest.mark.parametrize("kind", ["linear", "quad"])
def test_pixel_schedule_multiplies_in_float32_and_ends_at_one(kind):
    schedule = make_schedule(kind=kind)
    recorded = TENSORS[f"pixel_{kind}_1000/alphas_cumprod_float32_product"]
    assert torch.equal(schedule.abar, recorded)
    assert schedule.level(-1) == 1.0 and schedule.level(999) == float(schedule.abar[999])


def test_latent_schedule_multiplies_in_float64_and_ends_at_its_first_level():
    schedule = make_schedule(
        kind="scaled_linear", beta_start=0.0015, beta_end=0.0195, space="latent"
    )
    recorded = TENSORS["latent_linear_0.0015_0.0195/alphas_cumprod"].float()
    assert torch.equal(schedule.abar, recorded)
    assert schedule.level(-1) == float(recorded[0])


def test_openai_schedule_stays_in_float64_and_time_may_count_to_1000():
    schedule = make_schedule(kind="cosine", timesteps=4000, space="pixel64", rescale_timesteps=True)
    assert (
        schedule.abar.dtype == torch.float64
        and schedule.level(-1) == 1.0
        and schedule.time_scale == 0.25
    )
    assert (
        np.abs(schedule.abar.numpy() - TENSORS["improved_cosine_4000/alphas_cumprod"].numpy()).max()
        <= 1e-12
    )
    assert make_schedule().time_scale == 1


def test_habits_of_a_space_can_be_overridden():
    assert [
        (make_schedule(space=space).variance, make_schedule(space=space).clip)
        for space in ("pixel", "pixel64", "latent")
    ] == [("large", None), ("learned", True), ("small", False)]
    changed = make_schedule(space="pixel64", variance="large", clip=False)
    assert (changed.variance, changed.clip) == ("large", False)


def test_levels_as_released_have_the_precision_of_the_table():
    exact, released = make_schedule(), make_schedule(as_released=True)
    assert isinstance(exact.level(5), float) and released.level(5).dtype == torch.float32
    assert float(released.level(5)) == exact.level(5) and float(released.level(-1)) == 1.0


STEP_LISTS = [key for key in TENSORS if key.startswith(("steps_pixel", "steps_latent"))]
RESPACED = [key for key in TENSORS if key.startswith("steps_respaced")]


@pytest.mark.parametrize("key", STEP_LISTS)
def test_step_sequence(key):
    kind, count = key.split("/")
    _, space, skip = kind.split("_")
    assert step_sequence(skip, int(count), make_schedule(space=space)) == TENSORS[key].tolist()


@pytest.mark.parametrize("key", RESPACED)
def test_respaced_step_sequence(key):
    total, respacing = key.split("/")[1].split("_")
    schedule = make_schedule(timesteps=int(total), kind="improved_linear", space="pixel64")
    num = len(TENSORS[key])
    words = (
        ["ddim"]
        if respacing.startswith("ddim")
        else [respacing]
        if "," in respacing
        else [respacing, "respaced"]
    )
    for skip in words:
        assert step_sequence(skip, num, schedule) == TENSORS[key].tolist()


def test_sequences_of_one_step_and_of_all():
    schedule = make_schedule(timesteps=30, space="latent")
    assert (
        step_sequence("respaced", 30, schedule)
        == list(range(30))
        == step_sequence("ddim", 30, schedule)
    )
    assert step_sequence("respaced", 1, schedule) == [0] and step_sequence(
        "1,1,1", 3, schedule
    ) == [0, 10, 20]
    assert step_sequence("time_uniform", 2, schedule) == [14.5, 29.0]


@pytest.mark.parametrize(
    "skip, count, space, word",
    [
        ("10,20", 10, "pixel", "has 30 steps, but 10 are asked for; set steps to 30"),
        ("600,100", 700, "pixel", "section 1 of 2 asks for 600 of 500"),
        ("0,5", 5, "pixel", "asks for 0 of 500"),
        ("ddim", 600, "pixel", "no whole stride gives exactly 600"),
        ("10,,5", 15, "pixel", "'10,,5' is unknown"),
        ("uniform", 0, "pixel", "0 sampling steps"),
        ("uniform", 1001, "pixel", "1001 sampling steps"),
        ("quadd", 10, "pixel", "'quadd'"),
        ("uniform", 27, "latent", "past the end"),
        ("uniform", 1000, "latent", "past"),
    ],
)
def test_impossible_step_sequence(skip, count, space, word):
    with pytest.raises(ValueError, match=word):
        step_sequence(skip, count, make_schedule(space=space))


def test_unknown_words_are_quoted():
    with pytest.raises(ValueError, match="'lin' is unknown; choose one of linear"):
        make_schedule(kind="lin")
    with pytest.raises(
        ValueError, match="variance 'fixed' is unknown; choose one of large, small, learned"
    ):
        make_schedule(variance="fixed")
    with pytest.raises(
        ValueError, match="'voxel' is unknown; choose one of pixel, pixel64, latent"
    ):
        make_schedule(space="voxel")

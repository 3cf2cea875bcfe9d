"""Where trajectories begin: in noise, in data, or in the model's own images."""

import math

import numpy as np
import pytest
import torch
import yaml
from calibration_runs import collect, folders, trajectory
from PIL import Image
from pipeline import write_latent_model
from safetensors.torch import load_file

from ddim.schedule import make_schedule, step_sequence
from models.diffusion import load_model
from tinydm.stages.trajectories import SEED_OFFSET


def test_i2n_begins_in_diffused_images(tiny_yaml, grey_images):
    found = collect(
        tiny_yaml,
        "run",
        "calibration.start=i2n",
        f"calibration.data={grey_images}",
        "calibration.steps=5",
    )
    loaded = load_model(yaml.safe_load(tiny_yaml.read_text()), device="cpu")
    # the noisiest of five uniform steps
    level = loaded.schedule.level(800)
    eps = loaded.noise(1000 + SEED_OFFSET, range(6)).draw()
    assert level > 1e-3 and found.t[0] == 800
    x0 = (found.x[:6] - (1 - level) ** 0.5 * eps) / level**0.5
    grey = ((x0.mean((1, 2, 3)) + 1) * 127.5).round()
    assert (
        (x0.std((1, 2, 3)) < 1e-3).all()
        and set(grey.tolist()) <= {10.0, 60.0, 160.0, 250.0}
        and len(set(grey)) > 1
    )
    chain = trajectory(tiny_yaml, 4, start=lambda batch: (found.x[:4], 5))
    # and goes on as the sampler does
    assert torch.equal(found.x[6:10], chain[1][0][:4])


def test_i2n_of_other_images_is_another_trajectory(tiny_yaml, grey_images):
    words = ["calibration.start=i2n", f"calibration.data={grey_images}"]
    first = collect(tiny_yaml, "first", *words)
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(grey_images / "0.png")
    collect(tiny_yaml, "second", *words)
    assert len(folders(tiny_yaml)) == 2 and len(first) == 12


def test_di2n_begins_in_the_models_own_images_with_fresh_noise(tiny_yaml):
    found = collect(
        tiny_yaml,
        "run",
        "calibration.start=di2n",
        "calibration.start_step=0.6",
        "calibration.steps=3",
    )
    # the last three of 800, 600, 400, 200, 0
    assert sorted(set(found.t.tolist())) == [0.0, 200.0, 400.0]
    loaded = load_model(yaml.safe_load(tiny_yaml.read_text()), device="cpu")
    clean = [
        load_file(path)["x"][-1]
        for path in sorted(tiny_yaml.parent.glob("trajectory-*/00000?.safetensors"))
        if load_file(path)["t"][0] == 800
    ]
    level, eps = loaded.schedule.level(400), loaded.noise(1000 + SEED_OFFSET, range(6)).draw()
    torch.testing.assert_close(
        found.x[:6], level**0.5 * torch.cat(clean)[:6] + (1 - level) ** 0.5 * eps
    )
    # as the trajectories to these images did
    began_with = loaded.noise(1000, range(6)).draw()
    both = torch.stack([found.x[:6] - level**0.5 * torch.cat(clean)[:6], began_with]).flatten(1)
    assert abs(float(both.corrcoef()[0, 1])) < 5 / began_with.numel() ** 0.5
    collect(tiny_yaml, "normal")
    # the clean images are those of the usual one
    assert len(folders(tiny_yaml)) == 2


def test_start_at_the_noisy_end_is_almost_standard_normal(tiny_yaml, grey_images):
    """In a chain of 1000 steps of which the last is visited the level is 4e-5."""
    words = [
        "sampling.skip=respaced",
        "schedule.clip=true",
        "calibration.images=64",
        "sampling.batch_size=64",
        "calibration.steps=1",
    ]
    for start in (
        ["calibration.start=i2n", f"calibration.data={grey_images}"],
        ["calibration.start=di2n"],
    ):
        x = collect(tiny_yaml, start[0][-4:], *words, *start).x
        assert (
            abs(float(x.mean())) < 4 / x.numel() ** 0.5
            and abs(float(x.var()) - 1) < 4 * (2 / x.numel()) ** 0.5
        )


@pytest.mark.parametrize(
    "facts, last, level",
    [
        ({"kind": "cosine", "timesteps": 4000, "space": "pixel64"}, 3999, 1.5e-10),
        ({}, 999, 4.0e-5),
        (
            {"kind": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0155, "space": "latent"},
            999,
            6.7e-4,
        ),
        (
            {"kind": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "space": "latent"},
            999,
            4.7e-3,
        ),
    ],
)
def test_what_is_left_of_the_image_at_the_noisy_end(facts, last, level):
    schedule = make_schedule(**facts)
    assert step_sequence("respaced", 10, schedule)[-1] == last
    assert math.isclose(schedule.level(last), level, rel_tol=0.05)


def test_latent_model_begins_in_encoded_images_and_with_guidance_the_features_of_both_halves_count(
    tmp_path, grey_images
):
    model = write_latent_model(tmp_path, "class")
    found = collect(
        model,
        "i2n",
        "calibration.start=i2n",
        f"calibration.data={grey_images}",
        "calibration.start_step=0.2",
        "calibration.steps=1",
    )
    loaded = load_model(yaml.safe_load(model.read_text()), device="cpu")
    level, eps = loaded.schedule.level(1), loaded.noise(1000 + SEED_OFFSET, range(6)).draw()
    assert (
        found.x.shape == (12, 3, 8, 8)
        and set(found.t.tolist()) == {1.0}
        and torch.equal(found.x[:6], found.x[6:])
    )
    x0 = (found.x[:6] - (1 - level) ** 0.5 * eps) / level**0.5
    grey = torch.tensor([10, 60, 160, 250.0])[:, None, None, None].expand(-1, 3, 16, 16) / 127.5 - 1
    known = loaded.first_stage.encode(grey) * 0.7
    assert ((x0[:, None] - known).abs().amax((2, 3, 4)).amin(1) < 1e-4 * known.abs().max()).all()
    both = collect(model, "tdac", "calibration.builder=tdac")
    assert len(both) == 24 and torch.equal(both.x[:12], both.x[12:]) and len(both.cond) == 7

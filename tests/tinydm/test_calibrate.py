"""scripts/calibrate.py: recorded trajectories, what is shared between runs, and where trajectories
begin."""

import math

import numpy as np
import pytest
import torch
import yaml
from conftest import randomize
from PIL import Image
from pipeline import MODELS
from safetensors.torch import load_file, save_file

from base.config import load
from base.files import PROJECT
from ddim.schedule import make_schedule, step_sequence
from models.diffusion import load_model
from models.sampling import sample
from models.weights import PREFIXES
from models.zoo import build_network
from quant.calibration.files import load_calibration
from tinydm import recipe
from tinydm.stages import calibrate

WORDS = [
    "sampling.steps=5",
    "sampling.batch_size=4",
    "calibration.steps=2",
    "calibration.images=6",
    "device=cpu",
]


@pytest.fixture
def model(tiny_config, tmp_path):
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


def trajectory(model_path, **how):
    """Full-precision images 0 .. 7 of seed 1000 in batches of 4, observed: per step x, eps (8, ...)
    and t."""
    model, seen = load_model(yaml.safe_load(model_path.read_text()), device="cpu"), {}
    for first in (0, 4):
        sample(
            model,
            model.eps,
            range(first, first + 4),
            steps=5,
            seed=1000,
            batch_size=4,
            callback=lambda step, t, x, eps, x0, _: seen.setdefault(step, []).append((x, eps, t)),
            **how,
        )
    return [
        (torch.cat([x for x, _, _ in parts]), torch.cat([e for _, e, _ in parts]), parts[0][2])
        for parts in seen.values()
    ]


def test_set_holds_inputs_of_the_network_and_the_step_it_was_told(model):
    found, seen = collect(model, "run"), trajectory(model)
    assert torch.equal(found.x, torch.cat([seen[step][0][:6] for step in (0, 2)]))
    assert (
        found.t.tolist()
        == [800.0] * 6 + [400.0] * 6
        == [float(seen[step][2]) for step in (0, 2) for _ in range(6)]
    )
    assert found.made["samples_per_step"] == [6, 0, 6, 0, 0]
    net = load_model(yaml.safe_load(model.read_text()), device="cpu").net
    expected = torch.cat([seen[step][1][:6] for step in (0, 2)])
    torch.testing.assert_close(net(found.x, found.t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["calibration.builder=tdac", "calibration.options.radius=0.1"],
        ["calibration.builder=normal", "calibration.options.std=0.5"],
    ],
)
def test_pairs_of_other_builders_are_on_the_trajectory_too(model, words):
    found, seen = collect(model, "run", *words), trajectory(model)
    step_of = {float(t): step for step, (_, _, t) in enumerate(seen)}
    assert len(found) == 12 and found.made["calibration"]["options"]
    for k, (x, t) in enumerate(zip(found.x, found.t)):
        assert torch.equal(x, seen[step_of[float(t)]][0][k % 6])


def test_legacy_pairing_ends_in_the_clean_image(model):
    found = collect(
        model,
        "run",
        "calibration.builder=normal",
        "calibration.options.pairing=legacy",
        "calibration.options.mean=1.0",
    )
    clean = load_file(folders(model)[0] / "000000.safetensors")["x"][-1]
    states = [x for x, _, _ in trajectory(model)]
    assert set(found.t.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0} and 4.0 in found.t
    for k, (x, t) in enumerate(zip(found.x, found.t)):
        if t < 4:
            assert torch.equal(x, states[int(t) + 1][k % 6])
        elif k % 6 < 4:
            assert torch.equal(x, clean[k % 6])
    drawn = load_model(yaml.safe_load(model.read_text()), device="cpu")
    images = sample(drawn, drawn.eps, range(4), steps=5, seed=1000, batch_size=4)
    # in pixel space the chain ends in it
    assert torch.equal(drawn.decode(clean), images)


def test_trajectories_are_shared_by_all_that_does_not_change_them(model, monkeypatch):
    whole = collect(model, "first")
    assert len(folders(model)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(calibrate, "sample", lambda *_, **__: pytest.fail("recorded again"))
        again = collect(
            model,
            "second",
            "bits.weight=4",
            "calibration.images=7",
            "sampling.num=9",
            "sampling.seed=3",
        )
        assert torch.equal(again.x[:6], whole.x[:6])
    collect(model, "third", "calibration.seed=1")
    collect(model, "fourth", "sampling.eta=1.0")
    collect(model, "fifth", "sampling.batch_size=2")
    assert len(folders(model)) == 4
    # a third batch joins the first two
    collect(model, "more", "calibration.images=9")
    assert (
        len(folders(model)) == 4
        and len(list(folders(model)[0].parent.glob("trajectory-*/000008.safetensors"))) == 1
    )


def test_finished_batches_are_kept_and_the_set_has_the_same_bytes(model, monkeypatch):
    collect(model, "whole")
    recorded, (folder,) = [], folders(model)
    (folder / "000004.safetensors").unlink()
    monkeypatch.setattr(
        calibrate, "sample", lambda *a, **k: recorded.append(a[2]) or sample(*a, **k)
    )
    collect(model, "resumed")
    assert recorded == [range(4, 8)]
    files = [model.parent / run / "calibration.safetensors" for run in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_damaged_batch_gets_one_sentence(model):
    collect(model, "whole")
    path = folders(model)[0] / "000004.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match="000004.safetensors is cut off .* remove it and make it again"
    ):
        collect(model, "again")


# ---- where trajectories begin


@pytest.fixture
def data(tmp_path):
    """A folder of four images of one grey level each."""
    (tmp_path / "data").mkdir()
    for i, level in enumerate((10, 60, 160, 250)):
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / f"data/{i}.png")
    return tmp_path / "data"


def test_i2n_begins_in_diffused_images(model, data):
    found = collect(
        model, "run", "calibration.start=i2n", f"calibration.data={data}", "calibration.steps=5"
    )
    loaded = load_model(yaml.safe_load(model.read_text()), device="cpu")
    # the noisiest of five uniform steps
    level = loaded.schedule.level(800)
    eps = loaded.noise(1000 + calibrate.OWN, range(6)).draw()
    assert level > 1e-3 and found.t[0] == 800
    x0 = (found.x[:6] - (1 - level) ** 0.5 * eps) / level**0.5
    grey = ((x0.mean((1, 2, 3)) + 1) * 127.5).round()
    assert (
        (x0.std((1, 2, 3)) < 1e-3).all()
        and set(grey.tolist()) <= {10.0, 60.0, 160.0, 250.0}
        and len(set(grey)) > 1
    )
    chain = trajectory(model, start=(found.x[:4], 5))
    # and goes on as the sampler does
    assert torch.equal(found.x[6:10], chain[1][0][:4])


def test_i2n_of_other_images_is_another_trajectory(model, data):
    words = ["calibration.start=i2n", f"calibration.data={data}"]
    first = collect(model, "first", *words)
    Image.fromarray(np.full((8, 8, 3), 100, np.uint8)).save(data / "0.png")
    collect(model, "second", *words)
    assert len(folders(model)) == 2 and len(first) == 12


def test_di2n_begins_in_the_models_own_images_with_fresh_noise(model):
    found = collect(
        model, "run", "calibration.start=di2n", "calibration.start_step=0.6", "calibration.steps=3"
    )
    # the last three of 800, 600, 400, 200, 0
    assert sorted(set(found.t.tolist())) == [0.0, 200.0, 400.0]
    loaded = load_model(yaml.safe_load(model.read_text()), device="cpu")
    clean = [
        load_file(path)["x"][-1]
        for path in sorted(model.parent.glob("trajectory-*/00000?.safetensors"))
        if load_file(path)["t"][0] == 800
    ]
    level, eps = loaded.schedule.level(400), loaded.noise(1000 + calibrate.OWN, range(6)).draw()
    torch.testing.assert_close(
        found.x[:6], level**0.5 * torch.cat(clean)[:6] + (1 - level) ** 0.5 * eps
    )
    # as the trajectories to these images did
    began_with = loaded.noise(1000, range(6)).draw()
    both = torch.stack([found.x[:6] - level**0.5 * torch.cat(clean)[:6], began_with]).flatten(1)
    assert abs(float(both.corrcoef()[0, 1])) < 5 / began_with.numel() ** 0.5
    collect(model, "normal")
    # the clean images are those of the usual one
    assert len(folders(model)) == 2


def test_start_at_the_noisy_end_is_almost_standard_normal(model, data):
    """In a chain of 1000 steps of which the last is visited the level is 4e-5."""
    words = [
        "sampling.skip=respaced",
        "schedule.clip=true",
        "calibration.images=64",
        "sampling.batch_size=64",
        "calibration.steps=1",
    ]
    for start in (
        ["calibration.start=i2n", f"calibration.data={data}"],
        ["calibration.start=di2n"],
    ):
        x = collect(model, start[0][-4:], *words, *start).x
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


def latent_model(folder):
    facts = MODELS["class"] | {
        "name": "class",
        "checkpoint": str(folder / "model.safetensors"),
        "weights": "raw",
    }
    torch.manual_seed(0)
    parts = {"unet": "network", "first_stage": "first_stage", "cond_stage": "cond_stage"}
    state = {
        PREFIXES[part] + name: value
        for part, key in parts.items()
        for name, value in randomize(build_network(**facts[key])).state_dict().items()
    }
    save_file(state | {"scale_factor": torch.tensor(0.7)}, folder / "model.safetensors")
    (folder / "model.yaml").write_text(yaml.safe_dump(facts))
    return folder / "model.yaml"


def test_latent_model_begins_in_encoded_images_and_with_guidance_the_features_of_both_halves_count(
    tmp_path, data
):
    model = latent_model(tmp_path)
    found = collect(
        model,
        "i2n",
        "calibration.start=i2n",
        f"calibration.data={data}",
        "calibration.start_step=0.2",
        "calibration.steps=1",
    )
    loaded = load_model(yaml.safe_load(model.read_text()), device="cpu")
    level, eps = loaded.schedule.level(1), loaded.noise(1000 + calibrate.OWN, range(6)).draw()
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


def test_pairs_of_a_network_with_its_own_clock_give_the_eps_of_the_trajectory_bit_for_bit(tmp_path):
    """One image at a time, so that the samples of the set run in the batches of the trajectory."""
    facts = MODELS["learned"] | {
        "name": "learned",
        "checkpoint": str(tmp_path / "model.safetensors"),
        "weights": "raw",
    }
    save_file(
        randomize(build_network(**facts["network"])).state_dict(), tmp_path / "model.safetensors"
    )
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(facts))
    found = collect(
        tmp_path / "model.yaml",
        "run",
        "calibration.builder=normal",
        "calibration.options.std=0.5",
        "calibration.steps=4",
        "calibration.images=4",
        "sampling.batch_size=1",
    )
    model, made = load_model(facts, device="cpu"), {}
    for image in range(4):
        sample(
            model,
            model.eps,
            [image],
            steps=5,
            seed=1000,
            batch_size=1,
            **facts["sampling"],
            callback=lambda step, t, x, eps, *_: made.__setitem__((image, step), (x, eps)),
        )
    # steps 399, 299, 200, 100 and 0 of 400, the noisiest first
    times = [997.5, 747.5, 500.0, 250.0, 0.0]
    assert (
        len(found) == 16
        and len(made) == 20
        and set(found.t.tolist()) <= set(times)
        and len(found.t.unique()) > 2
    )
    for k, image in enumerate(found.trajectory.tolist()):
        x, eps = made[image, times.index(float(found.t[k]))]
        assert torch.equal(found.x[k : k + 1], x)
        assert torch.equal(model.eps(*found.arguments(slice(k, k + 1))), eps)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["calibration.start=d2in"], "calibration.start 'd2in' is unknown; did you mean 'di2n'"),
        (["calibration.start=i2n"], "which needs images; give calibration.data=FOLDER"),
        (["sampling.seed=1000"], "sampling.seed and the calibration.seed are both 1000"),
        (
            ["passes=[fit_ranges,correct_noise]", "sampling.seed=2000"],
            "the seed of the pass correct_noise are both 2000",
        ),
        (
            ["passes=[fit_ranges,{correct_noise: {seed: 7}}]", "sampling.seed=7"],
            "of the pass correct_noise are both 7",
        ),
        (["calibration.start_step=0.5"], "calibration.start_step is 0.5 with start 'normal'"),
        (["calibration.start=di2n", "calibration.start_step=0.0"], "must lie above 0"),
        (
            ["calibration.builder=normal", "calibration.options.menan=0.5"],
            "has no option 'menan'; did you mean 'mean'",
        ),
        (
            ["calibration.start=di2n", "calibration.start_step=0.2"],
            "2 calibration steps asked for, the trajectory has 1",
        ),
    ],
)
def test_impossible_choices_get_one_sentence_before_any_sampling(
    model, monkeypatch, words, sentence
):
    monkeypatch.setattr(calibrate, "sample", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError) as caught:
        collect(model, "run", *words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_every_start_that_the_recipe_knows_is_there():
    assert tuple(calibrate.STARTS) == recipe.STARTS


@pytest.mark.parametrize(
    "method, builder, start",
    [
        ("ptq4dm", "normal", "normal"),
        ("uniform", "linspace", "normal"),
        ("i2n", "linspace", "i2n"),
        ("di2n", "linspace", "di2n"),
    ],
)
def test_method_files(model, data, method, builder, start):
    words = [f"calibration.data={data}"] if start == "i2n" else []
    found = collect(model, "run", *words, method=method)
    config = load(recipe.RunConfig, [model.parent / "run/config.yaml"])
    assert (config.method, config.calibration.builder, config.calibration.start) == (
        method,
        builder,
        start,
    )
    assert len(found) == 12 and [name for entry in config.passes for name in entry] == [
        "fit_ranges"
    ]
    first, probs, *embedding = config.rules
    assert [rule["role"] for rule in embedding] == ([] if method == "ptq4dm" else ["scale_shift"])
    assert first["weight"] == {"bits": 8, "per": "channel", "range": "mse", "symmetric": True}
    assert first["input"] == {"bits": 8, "range": "mse", "symmetric": True, "ema": 0.9}
    assert probs == {"kind": "matmul", "role": "probs", "input": {"bits": 8, "symmetric": False}}

"""scripts/calibrate.py: recorded trajectories, what is shared between runs, and what is refused."""

import pytest
import torch
import yaml
from calibration_runs import collect, folders, trajectory
from conftest import randomize
from pipeline import MODELS
from safetensors.torch import load_file, save_file

from base.config import load
from models.diffusion import load_model
from models.sampling import Sampling, denoise, sample
from models.zoo import build_network
from tinydm import recipe
from tinydm.stages import trajectories


def test_set_holds_inputs_of_the_network_and_the_step_it_was_told(tiny_yaml):
    found, seen = collect(tiny_yaml, "run"), trajectory(tiny_yaml)
    assert torch.equal(found.x, torch.cat([seen[step][0][:6] for step in (0, 2)]))
    assert (
        found.t.tolist()
        == [800.0] * 6 + [400.0] * 6
        == [float(seen[step][2]) for step in (0, 2) for _ in range(6)]
    )
    assert found.made["samples_per_step"] == [6, 0, 6, 0, 0]
    net = load_model(yaml.safe_load(tiny_yaml.read_text()), device="cpu").net
    expected = torch.cat([seen[step][1][:6] for step in (0, 2)])
    torch.testing.assert_close(net(found.x, found.t), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "words",
    [
        ["calibration.builder=tdac", "calibration.options.radius=0.1"],
        ["calibration.builder=normal", "calibration.options.std=0.5"],
    ],
)
def test_pairs_of_other_builders_are_on_the_trajectory_too(tiny_yaml, words):
    found, seen = collect(tiny_yaml, "run", *words), trajectory(tiny_yaml)
    step_of = {float(t): step for step, (_, _, t) in enumerate(seen)}
    assert len(found) == 12 and found.made["calibration"]["options"]
    for k, (x, t) in enumerate(zip(found.x, found.t)):
        assert torch.equal(x, seen[step_of[float(t)]][0][k % 6])


def test_legacy_pairing_ends_in_the_clean_image(tiny_yaml):
    found = collect(
        tiny_yaml,
        "run",
        "calibration.builder=normal",
        "calibration.options.pairing=legacy",
        "calibration.options.mean=1.0",
    )
    clean = load_file(folders(tiny_yaml)[0] / "000000.safetensors")["x"][-1]
    states = [x for x, _, _ in trajectory(tiny_yaml)]
    assert set(found.t.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0} and 4.0 in found.t
    for k, (x, t) in enumerate(zip(found.x, found.t)):
        if t < 4:
            assert torch.equal(x, states[int(t) + 1][k % 6])
        elif k % 6 < 4:
            assert torch.equal(x, clean[k % 6])
    drawn = load_model(yaml.safe_load(tiny_yaml.read_text()), device="cpu")
    images = drawn.sample(range(4), steps=5, seed=1000, batch_size=4)
    # in pixel space the chain ends in it
    assert torch.equal(drawn.decode(clean), images)


def test_trajectories_are_shared_by_all_that_does_not_change_them(tiny_yaml, monkeypatch):
    whole = collect(tiny_yaml, "first")
    assert len(folders(tiny_yaml)) == 1
    with monkeypatch.context() as patch:
        patch.setattr(trajectories, "denoise", lambda *_, **__: pytest.fail("recorded again"))
        again = collect(
            tiny_yaml,
            "second",
            "bits.weight=4",
            "calibration.images=7",
            "sampling.num=9",
            "sampling.seed=3",
        )
        assert torch.equal(again.x[:6], whole.x[:6])
    collect(tiny_yaml, "third", "calibration.seed=1")
    collect(tiny_yaml, "fourth", "sampling.eta=1.0")
    collect(tiny_yaml, "fifth", "sampling.batch_size=2")
    assert len(folders(tiny_yaml)) == 4
    # a third batch joins the first two
    collect(tiny_yaml, "more", "calibration.images=9")
    assert (
        len(folders(tiny_yaml)) == 4
        and len(list(folders(tiny_yaml)[0].parent.glob("trajectory-*/000008.safetensors"))) == 1
    )


def test_finished_batches_are_kept_and_the_set_has_the_same_bytes(tiny_yaml, monkeypatch):
    collect(tiny_yaml, "whole")
    recorded, (folder,) = [], folders(tiny_yaml)
    (folder / "000004.safetensors").unlink()
    monkeypatch.setattr(
        trajectories, "denoise", lambda *a, **k: recorded.append(a[1]) or denoise(*a, **k)
    )
    collect(tiny_yaml, "resumed")
    assert recorded == [range(4, 8)]
    files = [tiny_yaml.parent / run / "calibration.safetensors" for run in ("whole", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_damaged_batch_gets_one_sentence(tiny_yaml):
    collect(tiny_yaml, "whole")
    path = folders(tiny_yaml)[0] / "000004.safetensors"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(
        ValueError, match="000004.safetensors is cut off .* remove it and make it again"
    ):
        collect(tiny_yaml, "again")


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
            [image],
            Sampling(**facts["sampling"], steps=5, seed=1000, batch_size=1),
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
    tiny_yaml, monkeypatch, words, sentence
):
    monkeypatch.setattr(trajectories, "denoise", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError) as caught:
        collect(tiny_yaml, "run", *words)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "method, builder, start",
    [
        ("ptq4dm", "normal", "normal"),
        ("uniform", "linspace", "normal"),
        ("i2n", "linspace", "i2n"),
        ("di2n", "linspace", "di2n"),
    ],
)
def test_method_files(tiny_yaml, grey_images, method, builder, start):
    words = [f"calibration.data={grey_images}"] if start == "i2n" else []
    found = collect(tiny_yaml, "run", *words, method=method)
    config = load(recipe.RunConfig, [tiny_yaml.parent / "run/config.yaml"])
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

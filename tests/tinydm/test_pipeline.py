"""All stages on a tiny model: the main command's path, its faults, and kill -9 in every stage."""

import errno
import json
import os
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipeline import NETWORK, WORDS, artefacts, everything, files, kill_when, start
from safetensors.torch import load_file, save_file

from base.files import PROJECT
from models.zoo import build_network
from quant.checkpoint import load_quantized, read_recipe
from tinydm import recipe, run_folder
from tinydm.report import command as report
from tinydm.stages import calibrate, evaluate, quantize, sample


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model YAML with random weights beside it."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    state = build_network(**NETWORK).state_dict()
    save_file(state, folder / "tiny.safetensors")
    facts = {
        "name": "tiny",
        "network": NETWORK,
        "checkpoint": str(folder / "tiny.safetensors"),
        "schedule": {"kind": "linear", "timesteps": 1000},
        "sampling": {"skip": "uniform"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(facts))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def done(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "reference"
    everything(model, out)
    return out


def test_all_stages_leave_what_they_promise(model, done):
    assert {p.name for p in done.iterdir()} == {
        "config.yaml",
        "calibration.safetensors",
        "quantized.safetensors",
        "passes.jsonl",
        "map.json",
        "map.txt",
        "samples",
        "samples.npz",
        "metrics.json",
        "report.html",
        "stages.jsonl",
    }
    archive = np.load(done / "samples.npz")["arr_0"]
    assert archive.dtype == np.uint8 and archive.shape == (6, 16, 16, 3)
    assert (archive[5] == np.array(Image.open(done / "samples/000005.png"))).all()
    metrics = json.loads((done / "metrics.json").read_text())
    assert len(metrics["sqnr_db_per_step"]) == 4 and metrics["paired"]["count"] == 6
    assert metrics["protocol"]["asked"]["provenance"]["files"] == [
        str(model),
        "configs/bits/w4a8.yaml",
        "configs/method/qdiffusion.yaml",
        "configs/preset/demo.yaml",
    ]
    assert metrics["sizes"]["quantized_bytes"] == (done / "quantized.safetensors").stat().st_size


def test_again_says_done_and_changes_nothing(model, done, capsys):
    before = {
        p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file() and p.name != "report.html"
    }
    everything(model, done)
    said = capsys.readouterr().out
    assert [
        f"{stage}: done already" in said
        for stage in ("calibrate", "quantize", "sample", "evaluate")
    ] == [True] * 4
    assert {
        p: p.stat().st_mtime_ns for p in done.rglob("*") if p.is_file() and p.name != "report.html"
    } == before


def test_same_seed_same_bytes_in_another_folder(model, done, tmp_path):
    everything(model, tmp_path / "again")
    assert artefacts(tmp_path / "again") == artefacts(done)


def test_shards_and_more_images_keep_the_bytes(model, done, tmp_path):
    out = tmp_path / "sharded"
    shutil.copytree(done, out)
    shutil.rmtree(out / "samples")
    (out / "samples.npz").unlink()
    for shard in ("1/2", "0/2"):
        sample.run([str(out), f"shard={shard}"])
    assert artefacts(out) == artefacts(done)
    # continues; the first six stay as they are
    sample.run([str(out), "sampling.num=9"])
    assert artefacts(out) == artefacts(done) and len(np.load(out / "samples.npz")["arr_0"]) == 9
    # as a kill before it was written anew leaves it
    shutil.copy(done / "samples.npz", out / "samples.npz")
    sample.run([str(out), "sampling.num=9"])
    assert len(np.load(out / "samples.npz")["arr_0"]) == 9


def test_stage_without_its_input_names_the_command(model, tmp_path):
    calibrate.run([*files(model), *WORDS, f"out={tmp_path}/run"])
    with pytest.raises(ValueError, match=r"python scripts/quantize.py"):
        sample.run([f"{tmp_path}/run"])
    with pytest.raises(ValueError, match=r"python scripts/sample.py .*precision=float"):
        evaluate.run([f"{tmp_path}/run"])
    with pytest.raises(ValueError, match="is no run folder"):
        quantize.run([str(tmp_path)])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["sampling.stps=4"], "did you mean 'steps'"),
        (["smapling.steps=4"], "did you mean 'sampling'"),
        (["bits.weight=9"], "weight bits 9 are impossible"),
        (["bits.input=0"], "input bits 0 are impossible"),
        (["sampling.steps=four"], "sampling.steps"),
        (["sampling.num=0"], "must be at least 1"),
        (["sampling.sampler=dimm"], "did you mean 'ddim'"),
        (["checkpoint=/nowhere/weights.safetensors"], "is not at"),
        (["device=tpu9"], "device 'tpu9'"),
        (["calibration.steps=5"], "calibration.steps is 5, but the sampler has 4 steps"),
        (["calibration.builder=unifrom"], "did you mean 'uniform'"),
        (
            ["schedule.beta_strat=0.1"],
            "schedule has no key 'beta_strat'; did you mean 'beta_start'",
        ),
        (
            ["schedule.timesteps=abc"],
            "schedule.timesteps is abc; it must be a whole number above 0",
        ),
        (["schedule.timesteps=10.5"], "schedule.timesteps is 10.5; it must be a whole number"),
        (["schedule.beta_end=0"], "schedule.beta_end is 0; it must be a number above 0"),
        (["passes=[3]"], "pass entry 3 must be a name"),
        (["passes=[{fit_ranges: 3}]"], "must be a name, or one with a mapping of its options"),
        (
            ["passes=[{segment_models: {passes: 3}}]"],
            "passes of segment_models must be a list; found 3",
        ),
        (["max_batch=0"], "max_batch is 0; it must be at least 1"),
    ],
)
def test_wrong_keys_and_values_get_one_sentence(model, tmp_path, words, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        calibrate.run([*files(model), *WORDS, f"out={tmp_path}/run", *words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()


def test_any_width_by_override(model, tmp_path):
    everything(model, tmp_path / "w5", "bits.weight=5", method="minmax")
    bits = {
        row["weight_bits"] for row in json.loads((tmp_path / "w5/map.json").read_text())["layers"]
    }
    assert bits == {5, None}


def test_exceptions_come_on_top_of_the_methods_rules(model, tmp_path):
    calibrate.run(
        [
            *files(model, method="minmax"),
            *WORDS,
            f"out={tmp_path / 'run'}",
            "exceptions=[{role: [stem, out], weight: {bits: 8}}, {match: mid.*, input: {bits: 6}}]",
        ]
    )
    quantize.run([str(tmp_path / "run")])
    layers = {
        row["name"]: row for row in json.loads((tmp_path / "run/map.json").read_text())["layers"]
    }
    assert {row["weight_bits"] for row in layers.values()} == {4, 8, None}
    assert layers["conv_in"]["weight_bits"] == layers["conv_out"]["weight_bits"] == 8
    assert layers["mid.block_1.conv1"]["input_bits"] == 6 and layers["conv_in"]["input_bits"] == 8
    load_quantized(tmp_path / "run/quantized.safetensors", build_network)


def test_options_of_a_methods_passes_can_be_changed_and_passes_left_out(model, tmp_path):
    run = tmp_path / "run"
    calibrate.run(
        [
            *files(model),
            *WORDS,
            f"out={run}",
            "pass_options.reconstruct=null",
            "pass_options.fit_ranges.num_samples=7",
        ]
    )
    quantize.run([str(run)])
    assert {
        json.loads(line)["pass"] for line in (run / "passes.jsonl").read_text().splitlines()
    } == {"fit_ranges"}
    assert read_recipe(run / "quantized.safetensors")[0]["passes"] == [
        {"fit_ranges": {"num_samples": 7}}
    ]


def test_folder_of_another_recipe_is_refused(model, done):
    for words in (["bits.weight=3"], ["sampling.steps=5"], ["seed=1"]):
        with pytest.raises(ValueError, match="belongs to another recipe") as caught:
            calibrate.run([*files(model), *WORDS, f"out={done}", *words])
        assert words[0].split("=")[0] in str(caught.value)


def test_shards_do_not_draw_again_by_force(done):
    with pytest.raises(ValueError, match="force=true would take images from the other shards"):
        sample.run([str(done), "shard=0/2", "force=true"])
    assert len(list((done / "samples").iterdir())) == 6


def test_quantized_again_it_has_no_images_and_scores_of_before(model, done, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(done, out)
    recipe = yaml.safe_load((out / "config.yaml").read_text())
    files_of = recipe["provenance"]["files"]
    recipe["provenance"]["commit"] = "older"
    (out / "config.yaml").write_text(yaml.safe_dump(recipe))
    quantize.run([str(out)])  # done already: nothing is touched
    assert yaml.safe_load((out / "config.yaml").read_text())["provenance"]["commit"] == "older"
    assert (out / "metrics.json").exists()
    quantize.run([str(out), "force=true"])
    made = yaml.safe_load((out / "config.yaml").read_text())["provenance"]
    assert made["commit"] != "older" and made["files"] == files_of
    assert not any((out / name).exists() for name in ("samples", "samples.npz", "metrics.json"))


def test_scores_of_another_recipe_are_not_taken_over(model, done, tmp_path):
    """A folder with nothing but its recipe and scores, as results/ holds them."""
    thin = tmp_path / "thin"
    thin.mkdir()
    for name in ("config.yaml", "metrics.json", "stages.jsonl"):
        shutil.copy(done / name, thin / name)
    before = {path: path.read_bytes() for path in thin.iterdir()}
    with pytest.raises(
        ValueError, match=r"belongs to another recipe: bits.weight \(4 there, 3 here\).*or delete"
    ):
        calibrate.run([*files(model), *WORDS, "bits.weight=3", f"out={thin}"])
    assert {path: path.read_bytes() for path in thin.iterdir()} == before
    calibrate.run([*files(model), *WORDS, f"out={thin}"])
    assert (thin / "calibration.safetensors").exists()


def test_full_precision_images_go_by_all_that_decides_them(model, done, tmp_path):
    run, prompts = run_folder.open_run(done), tmp_path / "prompts.txt"
    names = [sample.sample_folder(run, "float").name]
    run.config.sampling.num = 99
    assert sample.sample_folder(run, "float").name == names[0]
    for change in (
        lambda c: c.network.update(norm_groups=2),
        lambda c: setattr(c, "scale_factor", 0.5),
        lambda c: (setattr(c.sampling, "prompts", str(prompts)), prompts.write_text("a cat")),
        lambda c: prompts.write_text("a dog"),
        lambda c: setattr(c.sampling, "seed", 7),
    ):
        change(run.config)
        names.append(sample.sample_folder(run, "float").name)
    assert len(set(names)) == 6


def test_other_weights_under_the_same_name_are_refused(model, done, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    state = load_file(model.with_name("tiny.safetensors"))
    state["conv_in.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    config, weights = (out / "config.yaml").read_text(), str(model.with_name("tiny.safetensors"))
    (out / "config.yaml").write_text(config.replace(weights, str(tmp_path / "other.safetensors")))
    (out / "samples/000000.png").unlink()
    with pytest.raises(ValueError, match="other weights of tiny"):
        sample.run([str(out)])


class Touch:
    """A pickle that creates a file when it is loaded carelessly."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def corrupt_checkpoints(folder, good):
    data = good.read_bytes()
    (folder / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (folder / "noise.ckpt").write_bytes(b"not a checkpoint")
    with open(folder / "evil.ckpt", "wb") as file:
        pickle.dump(Touch(str(folder / "touched")), file)
    state = load_file(good)
    state["conv_in.weight"][0] = float("nan")
    save_file(state, folder / "nan.safetensors")
    return ["cut.safetensors", "noise.ckpt", "evil.ckpt", "nan.safetensors"]


def test_unusable_checkpoints_get_one_sentence_and_run_nothing(model, tmp_path):
    for name in corrupt_checkpoints(tmp_path, model.with_name("tiny.safetensors")):
        with pytest.raises(ValueError) as caught:
            calibrate.run(
                [*files(model), *WORDS, f"out={tmp_path}/run", f"checkpoint={tmp_path}/{name}"]
            )
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "other model"])
def test_unusable_quantized_files_get_one_sentence(model, done, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    path = out / "quantized.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    else:
        state = {k: v + 0.1 for k, v in load_file(model.with_name("tiny.safetensors")).items()}
        save_file(state, tmp_path / "other.safetensors")
        everything(
            model, tmp_path / "other", f"checkpoint={tmp_path}/other.safetensors", method="minmax"
        )
        shutil.copy(tmp_path / "other/quantized.safetensors", path)
    (out / "samples/000001.png").unlink()
    with pytest.raises(ValueError) as caught:
        sample.run([str(out)])
    assert "\n" not in str(caught.value) and "quantized.safetensors" in str(caught.value)


def test_full_disk_keeps_what_was_there(model, done, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(done, out)
    (out / "samples/000005.png").unlink()
    before = artefacts(done)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            sample.run([str(out)])
    assert not (out / "samples/000005.png").exists() and not list(out.rglob("*.part"))
    sample.run([str(out)])
    assert artefacts(out) == before


def test_killed_in_every_stage_the_run_ends_in_the_same_bytes(model, done, tmp_path):
    out = tmp_path / "killed"
    kill_when(
        start("calibrate", *files(model), *WORDS, f"out={out}"),
        lambda: list(tmp_path.glob("trajectory-*/*.safetensors")),
    )
    calibrate.run([*files(model), *WORDS, f"out={out}"])
    kill_when(
        start("quantize", out), lambda: len(list(out.glob("resume/quantize/*/*.safetensors"))) >= 3
    )
    assert not (out / "quantized.safetensors").exists()
    kept = {p: p.stat().st_mtime_ns for p in out.glob("resume/quantize/*/*.safetensors")}
    assert len(kept) >= 3
    quantize.run([str(out)])
    kill_when(start("sample", out), lambda: list(out.glob("samples/*.png")))
    sample.run([str(out)])
    sample.run([str(out), "precision=float"])
    kill_when(start("evaluate", out), lambda: True)
    evaluate.run([str(out)])
    kill_when(start("report", out), lambda: True)
    report.run([str(out)])
    assert [n for n, data in artefacts(done).items() if artefacts(out)[n] != data] == []
    assert not (out / "resume").exists() and not list(out.rglob("*.part"))


def test_a_stage_counts_the_seconds_and_the_largest_memory_of_all_its_parts(tmp_path, monkeypatch):
    clock, config = iter([0.0, 2.5, 10.0, 11.0, 20.0, 20.25]), recipe.RunConfig(out=str(tmp_path))
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: next(clock))
    whole = {"peak_rss_bytes": 7, "peak_cuda_bytes": 3}
    for peaks, force in ((whole, False), ({"peak_rss_bytes": 5}, False), ({}, True)):
        monkeypatch.setattr(run_folder, "peak_memory", lambda peaks=peaks: peaks)
        config.force = force
        with run_folder.Run(config).stage("quantize"):
            pass
        (row,) = map(json.loads, (tmp_path / "stages.jsonl").read_text().splitlines())
        assert row == {"stage": "quantize"} | (
            {"seconds": 0.25} if force else {"seconds": 3.5 if len(peaks) == 1 else 2.5} | whole
        )


def test_flatten_and_differences_ignore_what_changes_no_artefact():
    a, b = recipe.RunConfig(name="m"), recipe.RunConfig(name="m")
    b.device, b.memory_gb, b.sampling.num = "cuda", 1.0, 7
    assert recipe.differences(a, b) == []
    b.bits.weight = 4
    assert recipe.differences(a, b) == ["bits.weight (8 there, 4 here)"]


def test_driver_refuses_a_word_that_is_no_override():
    result = subprocess.run(
        ["bash", "sample_cifar.sh", "bits.weight"], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "is not key=value" in result.stderr


@pytest.mark.parametrize("native", [True, False])
def test_the_demo_learns_in_bfloat16_where_the_device_computes_it_and_says_so(
    model, tmp_path, monkeypatch, native
):
    monkeypatch.setattr(recipe, "computes_bfloat16", lambda device: native)
    words = [*files(model), *WORDS, f"out={tmp_path / 'run'}"]
    calibrate.run(words)
    # on another machine it goes on
    monkeypatch.setattr(recipe, "computes_bfloat16", lambda device: not native)
    calibrate.run(words)
    run = run_folder.open_run(tmp_path / "run")
    assert run.config.effort.bfloat16 is native
    assert run.config.passes[1]["reconstruct"]["bfloat16"] is native


def test_bfloat16_is_yes_no_or_auto(model, tmp_path):
    with pytest.raises(
        ValueError, match="effort.bfloat16 is maybe; it must be true, false or auto"
    ):
        calibrate.run([*files(model), *WORDS, "effort.bfloat16=maybe", f"out={tmp_path}/run"])

"""What a run folder and its stages refuse, each in one sentence, before any work begins."""

import pickle
import shutil
import subprocess

import pytest
import torch
from pipeline import WORDS, everything, files
from safetensors.torch import load_file, save_file

from base.files import PROJECT
from tinydm.stages import calibrate, evaluate, quantize, sample


def test_stage_without_its_input_names_the_command(pixel_model, tmp_path):
    calibrate.run([*files(pixel_model), *WORDS, f"out={tmp_path}/run"])
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
def test_wrong_keys_and_values_get_one_sentence(pixel_model, tmp_path, words, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        calibrate.run([*files(pixel_model), *WORDS, f"out={tmp_path}/run", *words])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/config.yaml").exists()


def test_folder_of_another_recipe_is_refused(pixel_model, pixel_run):
    for words in (["bits.weight=3"], ["sampling.steps=5"], ["seed=1"]):
        with pytest.raises(ValueError, match="belongs to another recipe") as caught:
            calibrate.run([*files(pixel_model), *WORDS, f"out={pixel_run}", *words])
        assert words[0].split("=")[0] in str(caught.value)


def test_shards_do_not_draw_again_by_force(pixel_run):
    with pytest.raises(ValueError, match="force=true would take images from the other shards"):
        sample.run([str(pixel_run), "shard=0/2", "force=true"])
    assert len(list((pixel_run / "samples").iterdir())) == 6


def test_scores_of_another_recipe_are_not_taken_over(pixel_model, pixel_run, tmp_path):
    """A folder with nothing but its recipe and scores, as results/ holds them."""
    thin = tmp_path / "thin"
    thin.mkdir()
    for name in ("config.yaml", "metrics.json", "stages.jsonl"):
        shutil.copy(pixel_run / name, thin / name)
    before = {path: path.read_bytes() for path in thin.iterdir()}
    with pytest.raises(
        ValueError, match=r"belongs to another recipe: bits.weight \(4 there, 3 here\).*or delete"
    ):
        calibrate.run([*files(pixel_model), *WORDS, "bits.weight=3", f"out={thin}"])
    assert {path: path.read_bytes() for path in thin.iterdir()} == before
    calibrate.run([*files(pixel_model), *WORDS, f"out={thin}"])
    assert (thin / "calibration.safetensors").exists()


def test_other_weights_under_the_same_name_are_refused(pixel_model, pixel_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(pixel_run, out)
    state = load_file(pixel_model.with_name("tiny.safetensors"))
    state["conv_in.bias"] += 1
    save_file(state, tmp_path / "other.safetensors")
    config, weights = (
        (out / "config.yaml").read_text(),
        str(pixel_model.with_name("tiny.safetensors")),
    )
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


def test_unusable_checkpoints_get_one_sentence_and_run_nothing(pixel_model, tmp_path):
    for name in corrupt_checkpoints(tmp_path, pixel_model.with_name("tiny.safetensors")):
        with pytest.raises(ValueError) as caught:
            calibrate.run(
                [
                    *files(pixel_model),
                    *WORDS,
                    f"out={tmp_path}/run",
                    f"checkpoint={tmp_path}/{name}",
                ]
            )
        assert "\n" not in str(caught.value) and name in str(caught.value)
    assert not (tmp_path / "touched").exists() and not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "other model"])
def test_unusable_quantized_files_get_one_sentence(pixel_model, pixel_run, tmp_path, damage):
    out = tmp_path / "run"
    shutil.copytree(pixel_run, out)
    path = out / "quantized.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"a": torch.zeros(1)}, path)
    else:
        state = {
            k: v + 0.1 for k, v in load_file(pixel_model.with_name("tiny.safetensors")).items()
        }
        save_file(state, tmp_path / "other.safetensors")
        everything(
            pixel_model,
            tmp_path / "other",
            f"checkpoint={tmp_path}/other.safetensors",
            method="minmax",
        )
        shutil.copy(tmp_path / "other/quantized.safetensors", path)
    (out / "samples/000001.png").unlink()
    with pytest.raises(ValueError) as caught:
        sample.run([str(out)])
    assert "\n" not in str(caught.value) and "quantized.safetensors" in str(caught.value)


def test_driver_refuses_a_word_that_is_no_override():
    result = subprocess.run(
        ["bash", "sample_cifar.sh", "bits.weight"], cwd=PROJECT, capture_output=True, text=True
    )
    assert result.returncode == 2 and "is not key=value" in result.stderr


@pytest.mark.parametrize(
    "word, complaint",
    [
        ("effort.dtype=fp16", "effort.dtype is fp16; it must be fp32, bf16 or auto"),
        ("effort.bfloat16=true", "is of an earlier version; say effort.dtype=bf16$"),
        ("pass_options.reconstruct.dtype=auto", "unknown; choose fp32 or bf16"),
    ],
)
def test_the_data_type_of_learning_is_one_of_two_or_auto(pixel_model, tmp_path, word, complaint):
    with pytest.raises(ValueError, match=complaint):
        calibrate.run([*files(pixel_model), *WORDS, word, f"out={tmp_path}/run"])

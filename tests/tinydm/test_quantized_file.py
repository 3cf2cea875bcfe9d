"""A quantized file alone, with its model's checkpoint, makes the images of its run folder; and the
stages' functions make the same without a run folder."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from base.config import load
from base.files import load_tensors, save_tensors
from quant.calibration.files import load_calibration
from quant.checkpoint import save_quantized
from tinydm.precision import with_precision
from tinydm.recipe import RunConfig
from tinydm.run_folder import open_run
from tinydm.stages.calibrate import collect
from tinydm.stages.quantize import load_quantized_model, quantize_model


def images_of(run):
    """(6, 3, H, W) uint8 as `sample` left them."""
    pictures = [np.array(Image.open(run / f"samples/{i:06d}.png")) for i in range(6)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def of_an_earlier_version(path):
    """The same file with the recipe that version ba71786 stored."""
    tensors, meta = load_tensors(path)
    later = ("sampling", "first_stage", "cond_stage", "scale_factor", "checkpoint", "weights")
    for key in later:
        del meta["recipe"][key]
    save_tensors(path, {name: value.clone() for name, value in tensors.items()}, meta)


def check_moved(run, folder):
    path = shutil.copy(run / "quantized.safetensors", folder / "moved.safetensors")
    model = load_quantized_model(path, "cpu")
    assert model.sampling.batch_size == 4 and model.sampling.steps == 4
    computing, _ = with_precision(model, "simulated", 4)
    assert torch.equal(computing.sample(range(6)), images_of(run))


def test_a_file_in_another_folder_makes_the_same_images(pixel_run, tmp_path):
    check_moved(pixel_run, tmp_path)


def test_a_file_of_a_latent_or_conditional_model_does_too(latent_run, tmp_path):
    check_moved(latent_run, tmp_path)


def test_a_file_goes_with_its_checkpoint_and_no_other(pixel_model, pixel_run, tmp_path):
    path, weights = pixel_run / "quantized.safetensors", pixel_model.with_name("tiny.safetensors")
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    model = load_quantized_model(path, "cpu", checkpoint=str(moved))
    computing, _ = with_precision(model, "simulated", 4)
    assert torch.equal(computing.sample([5]), images_of(pixel_run)[5:])
    other = {name: value + 0.1 for name, value in load_file(weights).items()}
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was made from other weights of 'tiny'"):
        load_quantized_model(path, "cpu", checkpoint=str(tmp_path / "other.safetensors"))


def test_a_file_of_an_earlier_version_needs_its_run_folder(pixel_run, tmp_path):
    for name in ("config.yaml", "quantized.safetensors"):
        shutil.copy(pixel_run / name, tmp_path / name)
    path = tmp_path / "quantized.safetensors"
    of_an_earlier_version(path)
    model = load_quantized_model(path, "cpu")
    computing, _ = with_precision(model, "simulated", 4)
    assert torch.equal(computing.sample([0, 1]), images_of(pixel_run)[:2])
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(
        ValueError, match="is of an earlier version .*, or quantize again"
    ) as caught:
        load_quantized_model(path, "cpu")
    assert "\n" not in str(caught.value)


def test_without_a_run_folder_the_same_set_and_network(pixel_model, pixel_run, tmp_path):
    """Rows of progress arrive; a folder for what is resumed may be given or not."""
    config, model = load(RunConfig, [pixel_run / "config.yaml"]), open_run(pixel_run).model
    calibration = collect(model, config)
    calibration.save(tmp_path / "set.safetensors")
    made = (tmp_path / "set.safetensors").read_bytes()
    assert made == (pixel_run / "calibration.safetensors").read_bytes()
    lines, rows = [], []
    net, recipe = quantize_model(model, config, calibration, log=lines.append, note=rows.append)
    save_quantized(tmp_path / "q.safetensors", net, recipe)
    made = (tmp_path / "q.safetensors").read_bytes()
    assert made == (pixel_run / "quantized.safetensors").read_bytes()
    assert lines and {row["pass"] for row in rows[-1]} == {"fit_ranges", "reconstruct"}


def test_a_set_of_another_model_is_refused(pixel_run, tmp_path):
    run = open_run(pixel_run)
    calibration = load_calibration(pixel_run / "calibration.safetensors")
    run.config.calibration.file = str(tmp_path / "set.safetensors")
    calibration.x = calibration.x[..., :8]
    calibration.save(tmp_path / "set.safetensors")
    with pytest.raises(ValueError, match=r"samples are \(3, 16, 8\), tiny takes \(3, 16, 16\)"):
        collect(run.model, run.config)

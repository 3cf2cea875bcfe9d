"""Latent models through all stages: conditions, guidance, first stage, resampling blocks, learned
variance."""

import json
import re

import numpy as np
import pytest
import torch
import yaml
from pipeline import WORDS, files
from tiny import capture_whole, walk

from models.diffusion import load_model
from models.sampling import Sampling
from models.sampling import sample as draw
from quant.calibration.files import load_calibration
from quant.graph import trace
from quant.reconstruction.store import Store
from tinydm.recipe import load_recipe
from tinydm.stages import calibrate, quantize, sample
from tinydm.stages.quantize import plan


def test_all_stages(latent_model, latent_run):
    archive = np.load(latent_run / "samples.npz")["arr_0"]
    assert archive.shape == (6, 16, 16, 3) and len({image.tobytes() for image in archive}) == 6
    metrics = json.loads((latent_run / "metrics.json").read_text())
    assert all(np.isfinite(row["sqnr_db"]) for row in metrics["sqnr_db_per_step"])
    steps = [json.loads(line) for line in (latent_run / "passes.jsonl").read_text().splitlines()]
    blocks = [
        s
        for s in steps
        if s.get("unit", "").endswith(("transformer_blocks.0", ".1", "middle_block.1"))
    ]
    assert blocks and all(np.isfinite(s["error_after"]) for s in blocks)


def test_same_bytes_again(latent_model, latent_run, tmp_path):
    again = str(tmp_path / "again")
    calibrate.run([*files(latent_model), *WORDS, f"out={again}"])
    quantize.run([again])
    sample.run([again])
    for name in ("calibration.safetensors", "quantized.safetensors", "samples/000005.png"):
        assert (tmp_path / "again" / name).read_bytes() == (latent_run / name).read_bytes(), name


def test_calibration_sees_what_the_network_sees(latent_model, latent_run):
    calibration = load_calibration(latent_run / "calibration.safetensors")
    loaded = load_model(yaml.safe_load(latent_model.read_text()), device="cpu")
    count = 6 * 4
    if loaded.condition is None:
        assert len(calibration) == count and calibration.cond is None
        return
    own = loaded.labels(1000, range(6))
    if loaded.guidance == 1:
        assert len(calibration) == count and torch.equal(
            calibration.arguments(slice(6, 12))[2], own
        )
        return
    assert len(calibration) == 2 * count and len(calibration.cond) == 7
    asked, null = (calibration.arguments(slice(start, start + 6)) for start in (6, count + 6))
    assert torch.equal(asked[0], null[0]) and torch.equal(asked[1], null[1])
    assert torch.equal(asked[2], own) and torch.equal(null[2], loaded.null_label().expand(6, 1, 5))


def test_guidance_is_the_formula(latent_model):
    loaded = load_model(yaml.safe_load(latent_model.read_text()), device="cpu")
    x, t, cond = torch.randn(2, *loaded.shape), torch.tensor([3.0, 300.0]), loaded.labels(0, [4, 9])
    found = loaded.eps(x, t, cond)
    if cond is None:
        assert torch.equal(found, loaded.net(x, t))
    elif loaded.guidance == 1:
        assert torch.equal(found, loaded.net(x, t, cond)) and found.shape[1] == 2 * x.shape[1]
    else:
        null = loaded.net(x, t, loaded.null_label().expand_as(cond))
        torch.testing.assert_close(found, null + 2.5 * (loaded.net(x, t, cond) - null))


@pytest.mark.parametrize("kept", [True, False])
def test_stream_with_a_condition_equals_whole_capture(latent_model, latent_run, tmp_path, kept):
    calibration = load_calibration(latent_run / "calibration.safetensors")
    net = load_model(yaml.safe_load(latent_model.read_text()), device="cpu").net
    graph = trace(net, calibration.arguments(slice(0, 1)))
    every, store = {unit: i + 1 for i, unit in enumerate(graph.units)}, Store(1.0, tmp_path)
    keep = None if kept else every
    for unit, ((inputs, output),) in walk([net], graph, calibration, store, keep, 9):
        whole_inputs, whole_output = capture_whole(net, unit, calibration, 9)
        assert torch.equal(output, whole_output), unit
        everything_read = slice(0, len(calibration))
        assert all(
            torch.equal(a[everything_read], b) for a, b in zip(inputs, whole_inputs, strict=True)
        ), unit


def test_images_do_not_depend_on_what_is_drawn_with_them(latent_model):
    loaded = load_model(yaml.safe_load(latent_model.read_text()), device="cpu")
    how = Sampling(steps=2, skip="uniform", eta=1.0, batch_size=4)
    whole = draw(loaded, range(4, 8), how)
    assert torch.equal(draw(loaded, [6], how)[0], whole[2])


def test_dry_run_needs_no_weights(latent_model):
    config = load_recipe(files(latent_model), [*WORDS, "checkpoint=nowhere", "out=none"])
    text = plan(config)
    assert "reconstruction units" in text and "x smaller" in text and "GiB of activations" in text
    assert re.search(r"\ntime: about .* s \(calibrate \d+ s, fit_ranges \d+ s, reconstruct ", text)
    assert re.search(r"\nmemory: about \d.* GiB at the most; disk: about 0.0. GiB$", text)


def test_guidance_without_a_null_class(latent_model):
    config = yaml.safe_load(latent_model.read_text()) | {"guidance": {"scale": 3.0}}
    with pytest.raises(
        ValueError, match="has no null condition to be guided away from; set guidance.scale=1"
    ):
        load_model(config, device="cpu")

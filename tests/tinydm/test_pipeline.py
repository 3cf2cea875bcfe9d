"""All stages on a tiny model: the main command's path, a full disk, and kill -9 in every stage."""

import errno
import itertools
import json
import os
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pipeline import WORDS, artefacts, everything, files, kill_when, start

from models.zoo import build_network
from quant.checkpoint import load_quantized, read_recipe
from tinydm import recipe, run_folder
from tinydm.report import command as report
from tinydm.stages import calibrate, evaluate, quantize, sample


def test_all_stages_leave_what_they_promise(pixel_model, pixel_run):
    assert {p.name for p in pixel_run.iterdir()} == {
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
    archive = np.load(pixel_run / "samples.npz")["arr_0"]
    assert archive.dtype == np.uint8 and archive.shape == (6, 16, 16, 3)
    assert (archive[5] == np.array(Image.open(pixel_run / "samples/000005.png"))).all()
    metrics = json.loads((pixel_run / "metrics.json").read_text())
    assert len(metrics["sqnr_db_per_step"]) == 4 and metrics["paired"]["count"] == 6
    assert metrics["protocol"]["asked"]["provenance"]["files"] == [
        str(pixel_model),
        "configs/bits/w4a8.yaml",
        "configs/method/qdiffusion.yaml",
        "configs/preset/demo.yaml",
    ]
    assert (
        metrics["sizes"]["quantized_bytes"] == (pixel_run / "quantized.safetensors").stat().st_size
    )


def test_again_says_done_and_changes_nothing(pixel_model, pixel_run, capsys):
    before = {
        p: p.stat().st_mtime_ns
        for p in pixel_run.rglob("*")
        if p.is_file() and p.name != "report.html"
    }
    everything(pixel_model, pixel_run)
    said = capsys.readouterr().out
    assert [
        f"{stage}: done already" in said
        for stage in ("calibrate", "quantize", "sample", "evaluate")
    ] == [True] * 4
    assert {
        p: p.stat().st_mtime_ns
        for p in pixel_run.rglob("*")
        if p.is_file() and p.name != "report.html"
    } == before


def test_stages_return_what_they_did_and_print_nothing(pixel_run, capsys):
    run = run_folder.open_run(pixel_run)
    for stage in (calibrate.calibrate, quantize.quantize, sample.draw, evaluate.evaluate):
        assert f"{run.folder}" in stage(run)
    assert capsys.readouterr().out == ""


def test_threads_and_exact_arithmetic_are_those_of_a_stage_alone(tmp_path, monkeypatch):
    cudnn, threads = torch.backends.cudnn, torch.get_num_threads()
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    run = run_folder.Run(recipe.RunConfig(out=str(tmp_path), threads=threads + 1))
    assert torch.get_num_threads() == threads
    with run.stage("quantize"):
        assert torch.get_num_threads() == threads + 1 and not cudnn.allow_tf32
    assert torch.get_num_threads() == threads and cudnn.allow_tf32


def drawn(model, out, *words, **choice):
    """The stages up to the quantized network's images."""
    calibrate.run([*files(model, **choice), *WORDS, f"out={out}", *words])
    quantize.run([str(out)])
    sample.run([str(out)])


def test_same_seed_same_bytes_in_another_folder(pixel_model, pixel_run, tmp_path):
    drawn(pixel_model, tmp_path / "again")
    assert artefacts(tmp_path / "again") == artefacts(pixel_run)


def test_shards_and_more_images_keep_the_bytes(pixel_model, pixel_run, tmp_path):
    out = tmp_path / "sharded"
    shutil.copytree(pixel_run, out)
    shutil.rmtree(out / "samples")
    (out / "samples.npz").unlink()
    for shard in ("1/2", "0/2"):
        sample.run([str(out), f"shard={shard}"])
    assert artefacts(out) == artefacts(pixel_run)
    # continues; the first six stay as they are
    sample.run([str(out), "sampling.num=9"])
    assert (
        artefacts(out) == artefacts(pixel_run) and len(np.load(out / "samples.npz")["arr_0"]) == 9
    )
    # as a kill before it was written anew leaves it
    shutil.copy(pixel_run / "samples.npz", out / "samples.npz")
    sample.run([str(out), "sampling.num=9"])
    assert len(np.load(out / "samples.npz")["arr_0"]) == 9


def test_any_width_by_override(pixel_model, tmp_path):
    drawn(pixel_model, tmp_path / "w5", "bits.weight=5", method="minmax")
    bits = {
        row["weight_bits"] for row in json.loads((tmp_path / "w5/map.json").read_text())["layers"]
    }
    assert bits == {5, None}


def test_exceptions_come_on_top_of_the_methods_rules(pixel_model, tmp_path):
    calibrate.run(
        [
            *files(pixel_model, method="minmax"),
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


def test_options_of_a_methods_passes_can_be_changed_and_passes_left_out(pixel_model, tmp_path):
    run = tmp_path / "run"
    calibrate.run(
        [
            *files(pixel_model),
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
        {"fit_ranges": {"num_samples": 7, "num_values": 512}}
    ]


def test_quantized_again_it_has_no_images_and_scores_of_before(pixel_model, pixel_run, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(pixel_run, out)
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


def test_full_disk_keeps_what_was_there(pixel_model, pixel_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(pixel_run, out)
    (out / "samples/000005.png").unlink()
    before = artefacts(pixel_run)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            sample.run([str(out)])
    assert not (out / "samples/000005.png").exists() and not list(out.rglob("*.part"))
    sample.run([str(out)])
    assert artefacts(out) == before


def test_killed_in_every_stage_the_run_ends_in_the_same_bytes(pixel_model, pixel_run, tmp_path):
    out = tmp_path / "killed"
    kill_when(
        start("calibrate", *files(pixel_model), *WORDS, f"out={out}"),
        lambda: list(tmp_path.glob("trajectory-*/*.safetensors")),
    )
    calibrate.run([*files(pixel_model), *WORDS, f"out={out}"])
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
    assert [n for n, data in artefacts(pixel_run).items() if artefacts(out)[n] != data] == []
    assert not (out / "resume").exists() and not list(out.rglob("*.part"))


def test_a_stage_counts_the_seconds_and_the_largest_memory_of_all_its_parts(tmp_path, monkeypatch):
    clock, config = iter([0.0, 2.5, 10.0, 11.0, 20.0, 20.25]), recipe.RunConfig(out=str(tmp_path))
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: next(clock))
    of_cpu = itertools.count()
    monkeypatch.setattr(run_folder.time, "process_time", lambda: next(of_cpu))
    whole = {"peak_rss_bytes": 7, "peak_cuda_bytes": 3}
    for peaks, force in ((whole, False), ({"peak_rss_bytes": 5}, False), ({}, True)):
        monkeypatch.setattr(run_folder, "peak_memory", lambda peaks=peaks: peaks)
        config.force = force
        with run_folder.Run(config).stage("quantize"):
            pass
        (row,) = map(json.loads, (tmp_path / "stages.jsonl").read_text().splitlines())
        assert row == {"stage": "quantize"} | (
            {"seconds": 0.25, "cpu_seconds": 1}
            if force
            else {"seconds": 3.5, "cpu_seconds": 2} | whole
            if len(peaks) == 1
            else {"seconds": 2.5, "cpu_seconds": 1} | whole
        )

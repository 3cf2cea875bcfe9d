"""scripts/analyze.py on tiny runs: what it writes, what it says, and that it measures once."""

import csv
import json

import pytest
import torch
import yaml
from pipeline import WORDS, files

from base.files import load_tensors
from models.diffusion import load_model
from quant.analysis import observe_ranges
from tinydm import run_folder
from tinydm.stages import analyze, calibrate, quantize

torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def few_pictures():
    """They take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analyze, "NUM_DRAWN", 2)
        yield


@pytest.fixture(scope="module")
def started(pixel_model, tmp_path_factory):
    """A run folder in which nothing was done, and what analyze leaves there."""
    out = tmp_path_factory.mktemp("runs") / "started"
    run_folder.create(
        files(pixel_model, method="minmax"),
        [*WORDS, "sampling.batch_size=2", "evaluation.sqnr_images=3", f"out={out}"],
    )
    analyze.run([str(out)])
    return out


@pytest.fixture(scope="module")
def quantized(pixel_model, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "quantized"
    calibrate.run([*files(pixel_model, method="minmax"), *WORDS, f"out={out}"])
    quantize.run([str(out)])
    analyze.run([str(out)])
    return out


def read_errors(folder):
    with open(folder / "layer_errors.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_ranges_before_anything_is_quantized(started, capsys):
    analyze.run([str(started), "points=conv_in"])
    said = capsys.readouterr().out
    assert f"python scripts/quantize.py {started}, then run this again" in said
    assert not (started / "layer_errors.csv").exists()
    tensors, meta = load_tensors(started / "ranges.safetensors")
    points = json.loads((started / "ranges.json").read_text())["points"]
    assert meta["t"] == [750, 500, 250, 0]
    assert {name.rpartition(".")[0] for name in tensors} == set(points)
    for name, facts in points.items():
        assert tensors[f"{name}.r_max"].shape == (4, facts["channels"]), name
    assert (
        tensors["conv_in.mean"].shape == (4, 3)
        and points["mid.attn_1.av_matmul.probs"]["channels"] == 1
    )


def test_ranges_are_those_of_the_trajectory_whatever_the_batches(started, pixel_model):
    """Images 0 to 2 in batches of 2 and 1; here as one batch, by a DDIM written out."""
    loaded = load_model(yaml.safe_load(pixel_model.read_text()), device="cpu")
    x, steps, abar = loaded.noise(0, range(3)).draw(), [], loaded.schedule.abar
    for t, t_next in ((750, 500), (500, 250), (250, 0), (0, None)):
        steps.append((750 - t, (x, torch.full((3,), float(t)))))
        with torch.no_grad():
            eps, a = loaded.net(*steps[-1][1]), abar[t].double()
        a_next = torch.tensor(1.0).double() if t_next is None else abar[t_next].double()
        x = (
            a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next).sqrt() * eps
        ).float()
    tensors, _ = load_tensors(started / "ranges.safetensors")
    for point, ranges in observe_ranges(loaded.net, steps).items():
        for kind, expected in vars(ranges).items():
            torch.testing.assert_close(tensors[f"{point}.{kind}"], expected, rtol=1e-4, atol=1e-5)


def test_a_quantized_run_has_errors_and_pictures(quantized):
    rows = read_errors(quantized)
    assert list(rows[0]) == ["layer", "step", "t", "mse", "mae", "sqnr_db"]
    layers = {row["name"] for row in json.loads((quantized / "map.json").read_text())["layers"]}
    assert {row["layer"] for row in rows} == layers and len(rows) == 4 * len(layers)
    assert all(float(row["mse"]) > 0 and 5 < float(row["sqnr_db"]) < 100 for row in rows)
    figures = {path.name for path in (quantized / "figures").iterdir()}
    assert "layer_errors.png" in figures and len(figures) == 2 * analyze.NUM_DRAWN + 1
    assert {name.removesuffix("-map.png") for name in figures if name.endswith("-map.png")} == {
        name.removesuffix("-surface.png") for name in figures if name.endswith("-surface.png")
    }


def test_measured_once_and_printed_by_name(quantized, capsys):
    before = {
        p: p.stat().st_mtime_ns for p in quantized.iterdir() if p.suffix in (".safetensors", ".csv")
    }
    analyze.run([str(quantized), "points=mid.attn_1.[!aq]*"])
    assert (
        sum(
            (quantized / f"figures/mid.attn_1.{name}-map.png").exists()
            for name in ("k", "v", "proj_out")
        )
        == 2
    )
    analyze.run([str(quantized), "points=mid.attn_1.*"])
    said = capsys.readouterr().out
    assert "measured already" in said and "lowest SQNR of a layer by itself" in said
    lines = [
        line.split()
        for line in said.split("quantization point")[-1].splitlines()
        if line.startswith("mid.")
    ]
    assert len(lines) == 8 and "conv_out" not in said
    imbalance = [float(line[3]) for line in lines]
    assert imbalance == sorted(imbalance, reverse=True) and imbalance[-1] == 1
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_another_number_of_images_is_measured_anew(quantized, capsys):
    analyze.run([str(quantized), "evaluation.sqnr_images=1", "points=conv_in"])
    assert "measured already" not in capsys.readouterr().out
    assert json.loads((quantized / "ranges.json").read_text())["asked"]["images"] == 1


def test_wrong_words_get_one_sentence(started, tmp_path):
    for words, sentence in (
        ([str(tmp_path)], "is no run folder"),
        (
            [str(started), "points=nothing"],
            "no quantization point matches points=nothing; .* for "
            "example temb.dense.0, temb.dense.1",
        ),
        ([str(started), "evaluation.sqnr_images=0"], "it must be at least 1"),
        ([str(started), "evaluation.sqnr_image=1"], "did you mean 'sqnr_images'"),
    ):
        with pytest.raises(ValueError, match=sentence) as caught:
            analyze.run(words)
        assert "\n" not in str(caught.value)


def test_conditions_and_guidance_are_part_of_what_is_seen(latent_model, tmp_path):
    run_folder.create(files(latent_model, method="minmax"), [*WORDS, f"out={tmp_path}/run"])
    analyze.run([f"{tmp_path}/run", "points=input_blocks.0.0"])
    tensors, meta = load_tensors(tmp_path / "run/ranges.safetensors")
    points = json.loads((tmp_path / "run/ranges.json").read_text())["points"]
    opened = run_folder.open_run(f"{tmp_path}/run")
    assert len(meta["t"]) == opened.num_evaluations == len(tensors["input_blocks.0.0.r_max"])
    if opened.model.is_guided:
        key = next(name for name in points if name.endswith("attn2.to_k"))
        seen = torch.cat([opened.model.labels(0, range(2)), opened.model.null_label()]).flatten(
            0, -2
        )
        assert torch.equal(tensors[f"{key}.r_max"], seen.amax(0).expand(4, -1))
        assert torch.equal(tensors[f"{key}.r_min"], seen.amin(0).expand(4, -1))

"""Comparisons of tiny models: what is shared, what is skipped, what fails, what is absent, and kill
-9."""

import csv
import json
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pipeline import NETWORK, WORDS, kill_when, start
from safetensors.torch import save_file

from base.config import load
from models.zoo import build_network
from tinydm import compare
from tinydm.report.table import Row
from tinydm.stages import calibrate, evaluate, quantize, sample

STAGES = {"calibrate": calibrate, "quantize": quantize, "sample": sample, "evaluate": evaluate}
REAL_RUN = subprocess.run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model YAMLs: tiny with random weights, broken with NaN weights, absent without."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    state = build_network(**NETWORK).state_dict()
    save_file(state, folder / "tiny.safetensors")
    save_file(
        state | {"conv_in.bias": torch.full((8,), float("nan"))}, folder / "broken.safetensors"
    )
    for name in ("tiny", "broken", "absent"):
        facts = {
            "name": name,
            "network": NETWORK,
            "checkpoint": str(folder / f"{name}.safetensors"),
            "schedule": {"kind": "linear", "timesteps": 1000},
            "sampling": {"skip": "uniform"},
            "download": f"bash scripts/download_models.sh {name}",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(facts))
    return folder


@pytest.fixture
def stages(monkeypatch):
    """Stages run inside the test's process instead of their own; the list of those that ran."""
    ran = []

    def run_here(command, *rest, stdout=None, **options):
        if command[0] != sys.executable:
            return REAL_RUN(command, *rest, stdout=stdout, **options)
        script, arguments = Path(command[1]).stem, [str(word) for word in command[2:]]
        ran.append((script, *arguments))
        try:
            STAGES[script].run(arguments)
        except ValueError as error:
            stdout.write(f"error: {error}\n".encode())
            return SimpleNamespace(returncode=2)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run_here)
    return ran


def plan_file(models, out, names=("tiny",), **more):
    facts = {
        "models": [str(models / f"{name}.yaml") for name in names],
        "bits": ["w4a8"],
        "methods": ["minmax"],
        "seeds": [1, 2],
        "overrides": WORDS,
        "out": str(out),
    } | more
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(facts))
    return str(path)


def csv_rows(out):
    return list(csv.DictReader((out / "table.csv").open()))


def test_rows_of_a_whole_a_broken_and_an_absent_model(models, tmp_path, stages):
    out = tmp_path / "all"
    file = plan_file(models, out, ("tiny", "broken", "absent"))
    compare.run([file])
    rows = {row["Model"]: row for row in csv_rows(out) if row["Method"] == "minmax"}

    psnr = [
        json.loads((out / f"tiny/minmax-w4a8-{seed}/metrics.json").read_text())["paired"]["psnr_db"]
        for seed in (1, 2)
    ]
    assert psnr[0] != psnr[1] and rows["tiny"]["Seeds"] == "2" and rows["tiny"]["Note"] == ""
    assert float(rows["tiny"]["PSNR dB"]) == pytest.approx((psnr[0] + psnr[1]) / 2)
    assert float(rows["tiny"]["PSNR dB spread"]) == pytest.approx(abs(psnr[0] - psnr[1]) / 2**0.5)
    assert float(rows["tiny"]["peak MB"]) > 1 and float(rows["tiny"]["Size MB"]) > 0

    assert "calibrate of seed 1 ended with status 2: error: " in rows["broken"]["Note"]
    assert "NaN" in rows["broken"]["Note"] and "seed 2" in rows["broken"]["Note"]
    assert rows["absent"]["Note"] == (
        f"needs {models}/absent.safetensors; fill this row with: bash "
        f"scripts/download_models.sh absent && python scripts/compare.py {file}"
    )
    for name in ("broken", "absent"):
        assert {
            value
            for key, value in rows[name].items()
            if key not in ("Model", "Timesteps", "Bit-width W/A", "Method", "Note")
        } == {""}
    # made once, for both seeds
    assert len(list((out / "tiny").glob("float-*/"))) == 1
    # recorded once for each
    assert len(list((out / "tiny").glob("trajectory-*/"))) == 2
    assert "fill this row with" in (out / "table.md").read_text()
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "report.html").read_text()
    assert "<h2>Comparison</h2>" in page and "fill this row with" in page

    tables, ran = [(out / f"table.{kind}").read_bytes() for kind in ("md", "csv")], len(stages)
    # again: the broken model is tried
    compare.run([file])
    assert {models / "broken.yaml"} == {Path(words[1]) for words in stages[ran:]}
    assert [(out / f"table.{kind}").read_bytes() for kind in ("md", "csv")] == tables


def test_finished_runs_are_skipped_until_more_is_asked(models, tmp_path, stages):
    out = tmp_path / "more"
    file = plan_file(models, out, seeds=[1])
    compare.run([file])
    stages.clear()
    compare.run([file])
    assert stages == []
    (out / "tiny/minmax-w4a8-2").mkdir()
    (out / "tiny/minmax-w4a8-2/calibration.safetensors").write_bytes(b"junk")
    # one seed fails, the other counts
    compare.run([plan_file(models, out)])
    _, row = csv_rows(out)
    assert (
        row["Seeds"] == "1"
        and row["PSNR dB"]
        and row["Note"].startswith("calibrate of seed 2 ended with status 2")
    )
    compare.run([plan_file(models, out, seeds=[1], overrides=[*WORDS, "sampling.num=7"])])
    assert ("sample", str(out / "tiny/minmax-w4a8-1")) in stages
    assert len(list((out / "tiny/minmax-w4a8-1/samples").glob("*.png"))) == 7
    # another recipe
    compare.run([plan_file(models, out, seeds=[1], overrides=[*WORDS, "sampling.steps=5"])])
    assert "belongs to another recipe" in csv_rows(out)[0]["Note"]


def test_killed_it_continues_to_the_same_bytes(models, tmp_path, stages):
    """A stage that outlives the killed comparison is waited for."""
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    file = plan_file(models, killed, seeds=[1])
    kill_when(
        start("compare", file),
        lambda: (killed / "tiny/shared-minmax-w4a8-1/calibration.safetensors").exists(),
    )
    assert not (killed / "table.md").exists()
    compare.run([file])
    compare.run([plan_file(models, whole, seeds=[1])])
    for name in ("calibration.safetensors", "quantized.safetensors", "samples/000005.png"):
        assert (killed / "tiny/minmax-w4a8-1" / name).read_bytes() == (
            whole / "tiny/minmax-w4a8-1" / name
        ).read_bytes()
    assert [row["PSNR dB"] for row in csv_rows(killed)] == [
        row["PSNR dB"] for row in csv_rows(whole)
    ]


def test_jobs_work_side_by_side_but_not_on_shared_files(models, tmp_path, monkeypatch):
    lock, now, most = threading.Lock(), {"shared": 0, "own": 0}, {"shared": 0, "own": 0}

    def pretend(command, env, pass_fds, **_):
        kind = (
            "shared"
            if (Path(command[1]).stem, *command[3:]) in [("sample", "precision=float")]
            or Path(command[1]).stem == "calibrate"
            else "own"
        )
        with lock:
            now[kind] += 1
            most[kind] = max(most[kind], now[kind])
        time.sleep(0.1)
        with lock:
            now[kind] -= 1
        assert env["OMP_NUM_THREADS"] >= "1" and len(pass_fds) == (2 if kind == "shared" else 1)
        return SimpleNamespace(returncode=int(Path(command[1]).stem == "evaluate"))

    monkeypatch.setattr(subprocess, "run", pretend)
    compare.run([plan_file(models, tmp_path / "jobs", seeds=[1, 2, 3, 4, 5]), "--jobs", "3"])
    assert most["shared"] == 1 and 1 < most["own"] <= 3
    assert (
        "evaluate of seed 5 ended with status 1: nothing"
        in (tmp_path / "jobs/table.md").read_text()
    )


def test_variants_are_rows_of_their_own_beside_the_images_of_their_sampler(
    models, tmp_path, stages, monkeypatch
):
    charts = []
    monkeypatch.setattr(compare, "score_chart", lambda *drawn: charts.append(drawn))
    out = tmp_path / "variants"
    compare.run(
        [
            plan_file(
                models,
                out,
                seeds=[1],
                variants={
                    "all": [],
                    "dpm": ["sampling.sampler=dpm_solver_pp_2m"],
                    "few": ["calibration.steps=2"],
                    # dpm cannot take the step 0 of uniform steps
                    "plms": ["sampling.sampler=plms"],
                    "qdrop.1": ["qdrop"],
                },
            )
        ]
    )
    names = {
        "minmax (all)": "all",
        "minmax (few)": "few",
        "minmax (plms)": "plms",
        "qdrop (qdrop.1)": "qdrop.1",
    }
    rows = {row["Method"]: row for row in csv_rows(out) if row["Method"] != "full precision"}
    assert set(rows) == {*names, "minmax (dpm)"}
    metrics = {
        name: json.loads((out / f"tiny/minmax-w4a8-{variant}-1/metrics.json").read_text())
        for name, variant in names.items()
    }
    assert {float(rows[name]["PSNR dB"]) for name in names} == {
        m["paired"]["psnr_db"] for m in metrics.values()
    }
    assert len({metrics[name]["float_samples"] for name in names}) == 2
    assert metrics["minmax (plms)"]["float_samples"] != metrics["minmax (all)"]["float_samples"]
    assert "plms 4 uniform" in rows["minmax (plms)"]["Protocol"]
    assert "ddim 4 uniform" in rows["minmax (few)"]["Protocol"]
    assert (
        "skip: time_uniform" in rows["minmax (dpm)"]["Note"]
        and rows["minmax (dpm)"]["Protocol"] == ""
    )
    assert [
        Path(words[1]).name for words in stages if words[0] == "sample" and "shared" in words[1]
    ] == ["shared-minmax-w4a8-all-1", "shared-minmax-w4a8-plms-1"]

    ((path, labels, panels),) = charts
    assert path == out / "figure.png" and labels == list(names)
    assert panels == {
        "PSNR to full precision, dB": [([m["paired"]["psnr_db"]], None) for m in metrics.values()]
    }


def test_the_figure_has_each_row_beside_its_own_full_precision(tmp_path, monkeypatch):
    def row(bits, method, protocol, *numbers):
        found = [
            {"Size MB": 1.0, "FD-net": fd} | ({"PSNR dB": psnr} if psnr else {})
            for fd, psnr in numbers
        ]
        return Row(
            "tiny", 20, bits, method, protocol, runs=["run"] * (bits != "32/32"), numbers=found
        )

    rows = [
        row("32/32", "full precision", "a", (2.0, None)),
        row("32/32", "full precision", "b", (5.0, None)),
        row("4/8", "m (x)", "a", (3.0, 30.0), (4.0, 31.0)),
        row("8/8", "m (x)", "b", (6.0, 40.0)),
        Row("tiny", 20, "8/8", "m (y)", "b", note="failed"),
    ]
    charts = []
    monkeypatch.setattr(compare, "score_chart", lambda *drawn: charts.append(drawn))
    compare.draw(rows, "a.png")
    assert charts == [
        (
            "a.png",
            ["W4A8", "W8A8"],
            {
                "FD-net (lower is better)": [([3.0, 4.0], 2.0), ([6.0], 5.0)],
                "PSNR to full precision, dB": [([30.0, 31.0], None), ([40.0], None)],
            },
        )
    ]
    compare.draw(rows[:3], "b.png")
    assert charts[1][1] == ["m (x)"]
    compare.draw(rows[-1:], "c.png")
    assert len(charts) == 2


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["variants=[quad]"], "variants must be a mapping .*; found \\['quad'\\]"),
        (["variants={a/b: []}"], "variant 'a/b' cannot be part of a folder's name"),
        (
            ["variants={quad: sampling.skip=quad}"],
            "variant 'quad' must be a list .*; found sampling.skip=quad",
        ),
        (["variants={quad: [quad]}"], "method/quad.yaml does not exist"),
        (["variants={quad: [sampling.skp=quad]}"], "did you mean 'skip'"),
        (["variants={a: [], b: []}"], "are the same recipe; leave one out"),
        (["methods=[minmaxx]"], "minmaxx.yaml does not exist; did you mean minmax.yaml"),
        (["methods=[tinydm,TWIN]"], "tinydm and .*twin.yaml are both called 'tinydm'"),
        (["models=[]"], "nothing to compare: models is empty"),
        (["seeds=[1,0]"], "sampling.seed and the calibration.seed are both 0"),
        (["overrides=[sampling.stps=4]"], "did you mean 'steps'"),
        (["modles=[]"], "did you mean 'models'"),
        (["--jobs", "1", "seeds=[1,0]"], "sampling.seed and the calibration.seed are both 0"),
        (["--jobs", "0"], "--jobs is 0"),
    ],
)
def test_mistakes_get_one_sentence_before_any_work(models, tmp_path, words, sentence):
    twin = tmp_path / "twin.yaml"
    twin.write_text(f"base: {compare.PROJECT}/configs/method/tinydm.yaml\nsegments: 2")
    with pytest.raises(ValueError, match=sentence):
        compare.run(
            [
                plan_file(models, tmp_path / "wrong"),
                *(word.replace("TWIN", str(twin)) for word in words),
            ]
        )
    assert not (tmp_path / "wrong").exists()


def test_a_variants_method_stands_in_the_place_of_the_rows(models, tmp_path):
    """Nothing of tinydm, which sets more keys, stays behind."""
    words = ["methods=[tinydm]", "variants={q: [qdiffusion], own: []}", "seeds=[1]"]
    plan = load(compare.CompareConfig, [plan_file(models, tmp_path / "v")], words)
    q, own = (cell.config for cell in compare.cells_of(plan))
    assert (q.method, q.segments, q.calibration.builder) == ("qdiffusion", 1, "uniform")
    assert (own.method, own.segments, own.calibration.builder) == ("tinydm", "per_step", "linspace")


def test_two_comparisons_in_one_folder_are_refused(models, tmp_path):
    file = plan_file(models, tmp_path / "one")
    with pytest.raises(ValueError, match="same out folder"):
        compare.run([file, file])


def test_the_files_that_ship_are_sound():
    for file in (compare.PROJECT / "configs" / "compare").glob("*.yaml"):
        plan = compare.load(compare.CompareConfig, [file])
        assert all(Path(compare.yaml_path("bits", bits)).exists() for bits in plan.bits)
        assert compare.cells_of(replace(plan, bits=["w4a4"], seeds=[1000]))


@pytest.mark.parametrize(
    "path", sorted((compare.PROJECT / "configs/compare").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_comparison_that_ships_says_what_can_be_run(path):
    plan = compare.load(compare.CompareConfig, [path], ["seeds=[1000]"])
    # the rest is alike, and a second's work for ten runs
    plan.bits = plan.bits[-1:]
    cells = compare.cells_of(plan)
    rows = len(plan.models) * len(plan.bits) * len(plan.methods) * len(plan.variants or [0])
    assert len({cell.folder for cell in cells}) == len(cells) == rows
    for cell in cells:
        for rule in cell.config.exceptions:
            assert rule.get("weight", {}).get("bits", 8) in (4, 8, cell.config.bits.weight)

"""Comparisons of tiny models: what is shared, what is skipped, what fails, what is absent, and kill
-9."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from comparison import csv_rows, plan_file
from pipeline import WORDS, kill_when, start

from base.config import load
from base.files import PROJECT
from tinydm import compare
from tinydm.plan import CompareConfig, cells_of
from tinydm.report import chart
from tinydm.report.results import read_results


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


def test_a_stage_inherits_the_locks_of_what_it_writes_to(models, tmp_path, monkeypatch):
    """Those that also write beside the run folder work one at a time there."""
    held = []

    def pretend(command, env, pass_fds, **_):
        script = Path(command[1]).stem
        held.append((script, *command[3:], len(pass_fds)))
        assert env["OMP_NUM_THREADS"] == "1" and env["CUDA_VISIBLE_DEVICES"] == "GPU-8fe"
        return SimpleNamespace(returncode=int(script == "evaluate"))

    monkeypatch.setattr(subprocess, "run", pretend)
    (cell,) = cells_of(load(CompareConfig, [plan_file(models, tmp_path / "locks", seeds=[5])]))
    note = "evaluate of seed 5 ended with status 1: nothing"
    told = compare.make_in_job(1, compare.INSIDE, [cell], "GPU-8fe")
    assert told == [(note, f"compare: {cell.folder}: {note}")]
    shared = {entry[0] for entry in held if entry[-1] == 2}
    assert shared == {"calibrate", "sample"} and ("sample", "precision=float", 2) in held
    assert [entry for entry in held if entry[-1] == 1] == [
        ("quantize", 1),
        ("sample", 1),
        ("evaluate", 1),
    ]


def test_variants_are_rows_of_their_own_beside_the_images_of_their_sampler(
    models, tmp_path, stages, monkeypatch
):
    charts = []
    monkeypatch.setattr(chart, "score_chart", lambda *drawn: charts.append(drawn))
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


def test_runs_of_a_results_file_are_not_made_again(models, tmp_path, stages):
    out = tmp_path / "first"
    compare.run([plan_file(models, out)])
    kept = out / "results.jsonl"
    names = [result.name for result in read_results(kept)]
    assert names == ["tiny/minmax-w4a8-1", "tiny/minmax-w4a8-2"]
    stages.clear()
    second = tmp_path / "second"
    compare.run([plan_file(models, second, seeds=[1, 2], known=str(kept))])
    assert stages == [] and not (second / "tiny").exists()
    rows = [csv_rows(folder) for folder in (out, second)]
    assert [row.pop("Runs") for row in rows[1]] == ["", " ".join(names)]
    for row in rows[0]:
        del row["Runs"]
    assert rows[0] == rows[1] and (second / "results.jsonl").read_bytes() == kept.read_bytes()

    # another recipe, another number of images: made here, and as long as it is not, not taken over
    for more in (["bits.weight=3"], ["sampling.num=5"]):
        plan = plan_file(
            models, tmp_path / "third", seeds=[1], known=str(kept), overrides=[*WORDS, *more]
        )
        assert not any(cell.known for cell in compare.cells_of(load(CompareConfig, [plan])))
    # a seed that the file lacks
    compare.run([plan_file(models, second, seeds=[1, 3], known=str(kept))])
    assert not (second / "tiny/minmax-w4a8-1").exists()
    assert [result.name for result in read_results(second / "results.jsonl")] == [
        "tiny/minmax-w4a8-1",
        "tiny/minmax-w4a8-3",
    ]


def test_progress_goes_to_the_caller(models, tmp_path, stages, capsys):
    said = []
    plan = load(CompareConfig, [plan_file(models, tmp_path / "quiet", ("absent",), seeds=[1])])
    rows = compare.compare(plan, compare.cells_of(plan), words="x.yaml", log=said.append)
    assert said == [f"compare: 1 runs in {plan.out}: 0 to make, 1 without checkpoint"]
    assert [row.note.partition(";")[0] for row in rows] == [f"needs {models}/absent.safetensors"]
    assert capsys.readouterr().out == ""


def enter(folder, entered):
    """A thread that waits for the lock of a folder, then notes which file it holds."""

    def wait():
        with compare.locked(folder) as lock:
            entered.append(os.fstat(lock).st_ino)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.3)
    return thread


def test_a_stage_that_outlives_its_comparison_holds_the_lock(tmp_path):
    """Its parent is gone without a word, as by kill -9."""
    parent = (
        "import os, pathlib, subprocess, sys\n"
        f"sys.path.insert(0, {str(PROJECT)!r})\n"
        "from tinydm.compare import locked\n"
        "with locked(pathlib.Path(sys.argv[1])) as lock:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=[lock])\n"
        "    print(child.pid, flush=True)\n"
        "    os._exit(1)\n"
    )
    words = [sys.executable, "-c", parent, str(tmp_path / "run")]
    done = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    child = int(done.stdout.readline())
    assert done.wait() == 1
    entered = []
    thread = enter(tmp_path / "run", entered)
    assert entered == []
    os.kill(child, signal.SIGKILL)
    thread.join(10)
    assert len(entered) == 1


def test_who_waits_for_a_folder_that_is_removed_locks_the_one_that_took_its_place(tmp_path):
    folder, entered = tmp_path / "run", []
    with compare.locked(folder):
        thread = enter(folder, entered)
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / ".lock").touch()
    thread.join(10)
    assert entered == [(folder / ".lock").stat().st_ino]


def test_where_the_file_system_has_no_locks_nobody_is_kept_out(tmp_path, monkeypatch):
    def refuse(number):
        def lock(descriptor):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(compare, "lock_descriptor", lock)

    refuse(errno.ENOSYS)
    with compare.locked(tmp_path / "run") as lock:
        assert os.fstat(lock).st_nlink == 1
    refuse(errno.EIO)
    with pytest.raises(OSError), compare.locked(tmp_path / "run"):
        pass

"""The command on a comparison of a tiny model: published and fast form, finished runs of others,
parts of the matrix."""

import json

import pytest
from comparison import plan_file
from pipeline import WORDS

from base.config import load
from tinydm import cli
from tinydm.benchmark import calibration
from tinydm.benchmark.calibration import CalibrationConfig, measured
from tinydm.plan import cells_of
from tinydm.report.results import merge_results, read_run


@pytest.fixture
def plan(models, tmp_path):
    """Two methods in two forms; the fast one by a preset of half the steps."""
    preset = tmp_path / "half.yaml"
    preset.write_text("preset: half\neffort: {weight_iters: 2, input_iters: 1}")
    words = [word for word in WORDS if not word.startswith("effort.")]
    published = ["effort.weight_iters=4", "effort.input_iters=2"]
    return plan_file(
        models,
        tmp_path / "out",
        methods=["qdiffusion", "minmax"],
        variants={"published": published, "fast": [str(preset)]},
        seeds=[1],
        overrides=[*words, "threads=1", "effort.dtype=fp32"],
    )


def test_one_command_makes_the_runs_and_says_what_they_cost(plan, tmp_path, stages, capsys):
    out = tmp_path / "out"
    cli.main(["benchmark", "calibration", plan, "methods=[qdiffusion]"])
    page = capsys.readouterr().out
    assert "| `qdiffusion` | published |" in page and "| `qdiffusion` | fast |" in page
    assert "where the CPU seconds go" in page and "CPU s: CPU seconds of" in page
    assert (out / "calibration.md").read_text() in page
    (shared,) = (out / "tiny").glob("shared-*")  # of the first run, for both
    kept, runs = json.loads(shared.read_text().splitlines()[0]), {}
    for form in ("published", "fast"):
        runs[form] = run = read_run(out / f"tiny/qdiffusion-w4a8-{form}-1")
        own = {row["stage"]: row["cpu_seconds"] for row in run.stages}
        total = kept["cpu_seconds"] + own["calibrate"] + own["quantize"]
        assert run.cost["cpu_seconds"] == pytest.approx(total, abs=0.011)
        where = run.cost["where"]
        assert where["trajectories"] == kept["cpu_seconds"] and where["reconstruct: learning"] > 0
        assert sum(where.values()) == pytest.approx(total, abs=0.1)
        assert run.cost["machine"]["threads"] == 1

    # again, of runs as compare leaves them: nothing is made, and what is missing is said
    stages.clear()
    for run in runs.values():
        (run.folder / "cost.json").unlink()
    cli.main(["benchmark", "calibration", plan, "make=false"])
    page = capsys.readouterr().out
    assert stages == [] and "2 of 4 runs (tiny w4a8: minmax fast, minmax published)." in page
    assert read_run(runs["fast"].folder).cost == runs["fast"].cost

    # once their lines are in a results file, the folders are not needed
    merge_results(tmp_path / "known.jsonl", runs.values())
    words = [f"known={tmp_path}/known.jsonl", f"out={tmp_path}/elsewhere"]
    results, notes = measured(cells_of(load(CalibrationConfig, [plan], words)))
    costs = {result.name: result.cost for result in results}
    assert costs == {run.name: run.cost for run in runs.values()} and notes == []

    shared.unlink()
    (runs["fast"].folder / "cost.json").unlink()
    cli.main(["benchmark", "calibration", plan, "make=false"])
    said = "- tiny/qdiffusion-w4a8-fast-1: no shared-*.stages.jsonl beside"
    assert said in capsys.readouterr().out


def test_a_run_that_fails_is_told(plan, monkeypatch, capsys):
    def fail(plan, cells, log):
        cells[0].note = "calibrate of seed 1 ended with status 2: error: full"

    monkeypatch.setattr(calibration, "compare", fail)
    calibration.run([plan, "methods=[minmax]"])
    page = capsys.readouterr().out
    assert "- tiny/minmax-w4a8-fast-1: calibrate of seed 1 ended with status 2" in page
    assert "Not measured: 2 of 2 runs" in page

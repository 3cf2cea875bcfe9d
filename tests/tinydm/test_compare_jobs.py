"""Comparisons whose runs are jobs of their own."""

import json

import comparison
import pytest
from comparison import csv_rows, plan_file

from tinydm import compare, launch

pytest.importorskip("submitit")


SAME = "paired", "sqnr_db_per_step", "sizes", "bit_operations"


def results(out):
    """Name -> scores, sizes and costs of the lines of results.jsonl."""
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return {row["run"]: {key: row["metrics"][key] for key in SAME} for row in rows}


def test_two_jobs_at_a_time_make_the_same_results(models, tmp_path, monkeypatch, stages, capsys):
    monkeypatch.setattr(compare, "make_in_job", comparison.make_in_job)
    compare.run([plan_file(models, tmp_path / "jobs"), "--jobs", "2"])
    assert stages == []  # nothing was made in this process
    said = capsys.readouterr().out
    assert f"compare: {tmp_path}/jobs/tiny/minmax-w4a8-2: done in " in said
    compare.run([plan_file(models, tmp_path / "turn", seeds=[2])])
    folders = [tmp_path / name for name in ("jobs", "turn")]
    jobs, turn = map(results, folders)
    assert len(jobs) == 2 and turn == {"tiny/minmax-w4a8-2": jobs["tiny/minmax-w4a8-2"]}
    for name in ("calibration.safetensors", "quantized.safetensors", "samples/000005.png"):
        place = f"tiny/minmax-w4a8-2/{name}"
        assert len({(folder / place).read_bytes() for folder in folders}) == 1
    assert [row["Note"] for row in csv_rows(tmp_path / "jobs")] == ["", ""]
    assert not [*(tmp_path / "jobs").glob("jobs-*"), *(tmp_path / "jobs/tiny").glob("shared-*/")]


def test_a_job_that_dies_is_told_and_what_it_left_is_made_by_the_next(
    models, tmp_path, monkeypatch, stages
):
    file = plan_file(models, tmp_path / "die", seeds=[1, 2])
    given = []

    def dies(work, tasks, ended, **how):
        given.append((len(tasks), how["jobs"]))
        for cells in tasks:
            if cells[0].config.seed == 2:
                ended(cells, None, "job 7 ended without a result: out of memory (x.err)")
            else:
                ended(cells, work(cells, None), "")

    monkeypatch.setattr(launch, "run_jobs", dies)
    compare.run([file, "launcher=local"])
    (row,) = [row for row in csv_rows(tmp_path / "die") if row["Method"] == "minmax"]
    assert row["Note"] == "job 7 ended without a result: out of memory (x.err)"
    assert row["Seeds"] == "1" and row["PSNR dB"]
    # what is shared by the model is one job, and it took the failure of its second run for none
    assert given == [(1, 1), (2, 1)]
    stages.clear()
    compare.run([file])
    assert {word for _, word, *_ in stages if "minmax-w4a8-1" in word} == set()
    (row,) = [row for row in csv_rows(tmp_path / "die") if row["Method"] == "minmax"]
    assert row["Seeds"] == "2" and row["Note"] == ""

"""Tables from synthetic run folders: mean and spread by hand, one table per protocol, rows without
numbers."""

import copy
import csv
import io
import json

import pytest

from tinydm.report import table
from tinydm.report.results import merge_results, read_run
from tinydm.report.table import Row, assemble, csv_text, markdown, row_of, tables

METRICS = {
    "protocol": {
        "asked": {
            "model": "tiny",
            "weights": "ema",
            "sampling": {"sampler": "ddim", "steps": 20, "skip": "quad", "eta": 0.0, "seed": 0},
            "guidance": {"scale": 1.0},
            "provenance": {"versions": {"torch": "9.9"}, "device": "cpu"},
        },
        "scores": {
            "count": 500,
            "reference": "photos",
            "extractor": "cifar-resnet",
            "tool": "tool 1",
        },
    },
    "float": {
        "scores": {"IS-cifar-resnet": 5.0, "IS-cifar-resnet-std": 0.1, "FD-cifar-resnet": 2.0}
    },
    "quantized": {
        "scores": {"IS-cifar-resnet": 4.0, "IS-cifar-resnet-std": 0.1, "FD-cifar-resnet": 3.0}
    },
    "paired": {
        "psnr_db": 30.0,
        "ssim": 0.9,
        "LPIPS-cifar-resnet": None,
        "count": 500,
        "FD-cifar-resnet to FP32": 0.25,
    },
    "sqnr_db_per_step": [{"step": 0, "sqnr_db": 10.0}, {"step": 1, "sqnr_db": 20.0}],
    "bit_operations": {"float": 4.0e12, "quantized": 1.25e11},
    "sizes": {"float_bytes": 8_000_000, "quantized_bytes": 1_500_000},
}


def make_run(folder, fd=3.0, seconds=5.0, peak="peak_rss_bytes", steps=20, seed=1, **recipe):
    """An evaluated run folder with just what the tables read."""
    folder.mkdir(parents=True)
    metrics = copy.deepcopy(METRICS)
    metrics["quantized"]["scores"]["FD-cifar-resnet"] = fd
    metrics["protocol"]["asked"]["sampling"]["steps"] = steps
    config = {
        "name": "tiny",
        "method": "minmax",
        "bits": {"weight": 4, "input": 8},
        "sampling": {"steps": steps},
        "seed": seed,
        "calibration": {"seed": seed},
        "out": str(folder),
    } | recipe
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    stages = [
        {"stage": "calibrate", "seconds": 2.0, peak: 3_000_000},
        {"stage": "quantize", "seconds": seconds, peak: 7_000_000},
        {"stage": "sample simulated", "seconds": 100.0, peak: 9_000_000},
    ]
    (folder / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in stages))
    return folder


def row_of_run(folder):
    return row_of(read_run(folder))


def cells(page):
    """Lines of the first Markdown table as lists of cells, the rule left out."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if "---" not in line
    ]


def test_a_row_has_the_columns_of_the_field(tmp_path):
    head, full, row = cells(markdown(assemble([row_of_run(make_run(tmp_path / "a"))])))
    assert dict(zip(head, row)) == {
        "Model": "tiny",
        "Timesteps": "20",
        "Bit-width W/A": "4/8",
        "Method": "minmax",
        "Seeds": "1",
        "Size MB": "1.50",
        "FD-cifar-resnet": "3.00",
        "IS-cifar-resnet": "4.00",
        "FD-cifar-resnet to FP32": "0.2500",
        "PSNR dB": "30.00",
        "SSIM": "0.900",
        "LPIPS-cifar-resnet": "–",
        "SQNR dB": "15.0",
        "GBOPs": "125.00",
        "calibration s": "7",
        "peak MB": "7",
    }
    assert full[2:5] == ["32/32", "full precision", ""]
    assert dict(zip(head, full)) | {
        "Size MB": "8.00",
        "FD-cifar-resnet": "2.00",
        "GBOPs": "4,000.00",
        "PSNR dB": "–",
        "calibration s": "–",
    } == dict(zip(head, full))
    assert head.index("FD-cifar-resnet") < head.index("IS-cifar-resnet")


def test_seeds_become_mean_and_sample_deviation(tmp_path):
    rows = assemble(
        [
            row_of_run(make_run(tmp_path / str(fd), fd=fd, seconds=fd, seed=int(fd)))
            for fd in (1.0, 2.0, 6.0)
        ]
    )
    assert len(rows) == 2 and len(rows[1].runs) == 3
    assert rows[1].mean("FD-cifar-resnet") == 3.0
    assert rows[1].spread("FD-cifar-resnet") == pytest.approx(((4 + 1 + 9) / 2) ** 0.5)
    head, _, row = cells(markdown(rows))
    assert (
        dict(zip(head, row))["FD-cifar-resnet"] == "3.00 ± 2.65"
        and dict(zip(head, row))["Seeds"] == "3"
    )
    found = list(csv.DictReader(io.StringIO(csv_text(rows))))
    assert float(found[1]["FD-cifar-resnet spread"]) == rows[1].spread("FD-cifar-resnet")
    assert found[1]["LPIPS-cifar-resnet"] == "" and found[0]["FD-cifar-resnet spread"] == ""
    assert "500 images of seed 0" in found[1]["Protocol"]


def test_another_protocol_gets_its_own_table(tmp_path):
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", method="other"),
        make_run(tmp_path / "c", steps=50),
    ]
    parts = tables(assemble([row_of_run(run) for run in runs]))
    assert [[line[3] for line in lines] for _, _, lines in parts] == [
        ["full precision", "minmax", "other"],
        ["full precision", "minmax"],
    ]
    assert "20 quad" in parts[0][0] and "50 quad" in parts[1][0]


def test_another_recipe_of_the_same_method_is_another_row(tmp_path):
    """Only seeds may be averaged; device, threads, folders and memory, also that of a pass, do not
    count."""
    runs = [
        make_run(tmp_path / "a", passes=[{"reconstruct": {"memory_gb": 4.0, "drop": 0.5}}]),
        make_run(tmp_path / "b", seed=2, threads=3, passes=[{"reconstruct": {"drop": 0.5}}]),
        make_run(tmp_path / "c", preset="x"),
    ]
    rows = assemble([row_of_run(run) for run in runs])
    assert [[run.folder.name for run in row.runs] for row in rows] == [[], ["a", "b"], ["c"]]
    assert [row["Runs"] for row in csv.DictReader(io.StringIO(csv_text(rows)))] == [
        "",
        f"{runs[0]} {runs[1]}",
        str(runs[2]),
    ]


def test_a_row_without_numbers_shows_its_note_alone(tmp_path):
    done = row_of_run(make_run(tmp_path / "a"))
    waiting = [
        Row("tiny", 20, "4/4", "minmax", done.protocol, note="needs a | b") for _ in range(2)
    ]
    head, _, _, row = cells(markdown(assemble([done, *waiting])))
    assert head[-1] == "Note" and row[-1] == r"needs a \| b" and row[2:4] == ["4/4", "minmax"]
    assert set(row[5:-1]) == {"–"} and row[4] == ""
    assert "nothing was evaluated" in markdown([Row("far", 20, "4/4", "minmax", note="needs it")])


def test_gpu_memory_counts_where_a_gpu_was_used(tmp_path):
    run = make_run(tmp_path / "a")
    rows = [
        {
            "stage": "calibrate",
            "seconds": 1,
            "peak_rss_bytes": 9_000_000,
            "peak_cuda_bytes": 4_000_000,
        },
        {
            "stage": "quantize",
            "seconds": 1,
            "peak_rss_bytes": 9_000_000,
            "peak_cuda_bytes": 5_000_000,
        },
    ]
    (run / "stages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert row_of_run(run).mean("peak MB") == 5.0


def test_runs_of_an_earlier_version(tmp_path):
    """Peaks they did not record are a dash; scores they did not have are asked for."""
    run = make_run(tmp_path / "a", peak="other")
    assert row_of_run(run).mean("peak MB") is None
    metrics = {key: value for key, value in METRICS.items() if key != "bit_operations"}
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="python scripts/evaluate.py .*/a force=true"):
        row_of_run(run)


def test_script_writes_the_table_and_refuses_what_it_cannot_read(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a")
    monkeypatch.setattr(
        table, "open_run", lambda folder: type("Run", (), {"need": lambda *_: None})
    )
    table.run([str(run), f"out={tmp_path}/table.md"])
    assert len(cells((tmp_path / "table.md").read_text())) == 3
    # lies beside the runs; and a run counts once
    (tmp_path / "float-1").mkdir()
    table.run([str(run), f"{run}/", str(tmp_path / "float-1"), f"out={tmp_path}/table.md"])
    head, _, row = cells((tmp_path / "table.md").read_text())
    assert dict(zip(head, row))["Seeds"] == "1"
    # a results file is as good as the folders
    merge_results(tmp_path / "plan.jsonl", [read_run(run)])
    page = (tmp_path / "table.md").read_text()
    table.run([str(tmp_path / "plan.jsonl"), f"out={tmp_path}/table.md"])
    assert (tmp_path / "table.md").read_text() == page
    for arguments in ([], [str(run), "to=x"]):
        with pytest.raises(ValueError, match="expected run folders and out=FILE"):
            table.run(arguments)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="is no run folder"):
        table.run([str(tmp_path)])


def test_several_widths_have_an_overview_of_methods_by_widths(tmp_path):
    wide = {"bits": {"weight": 8, "input": 8}}
    runs = [
        make_run(tmp_path / "a"),
        make_run(tmp_path / "b", method="other", **wide),
        make_run(tmp_path / "c", **wide),
    ]
    (caption, head, lines), whole = tables(assemble([row_of_run(run) for run in runs]))
    assert caption == f"PSNR dB / FD-cifar-resnet to FP32; {whole[0]}"
    assert head == ["Method", "W4A8", "W8A8"]
    assert lines == [
        ["minmax", "30.00 / 0.2500", "30.00 / 0.2500"],
        ["other", "–", "30.00 / 0.2500"],
    ]
    assert len(tables(assemble([row_of_run(run) for run in runs[1:]]))) == 1


def test_a_run_whose_stages_are_lost_has_no_time_and_no_memory(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "stages.jsonl").unlink()
    numbers = row_of_run(folder).numbers[0]
    assert numbers["calibration s"] is None and numbers["peak MB"] is None

"""What a run cost, from planted files whose sums are known."""

import json

import pytest
from test_table import make_run

from base.files import read_lines, write_lines
from tinydm.benchmark.cost import cost_of, note_cost, parts_of, trajectories_stage

STAGE = {"seconds": 100.0, "cpu_seconds": 50.0}  # half of the time others computed
MACHINE = {"name": "some", "isa": "AVX2", "threads": 1, "torch": "9", "date": "2026-01-01"}


def planted(tmp_path, name="a-w4a8-published-1", **recipe):
    """A run whose three stages took 8, 0.5 and 50 CPU seconds, the second of them the largest."""
    folder = make_run(tmp_path / f"tiny/{name}", **recipe)
    rows = [
        {"stage": "calibrate", "seconds": 1.0, "cpu_seconds": 0.5, "peak_rss_bytes": 9_000_000},
        {"stage": "quantize", **STAGE, "peak_rss_bytes": 7_000_000},
        {"stage": "evaluate", "seconds": 1.0, "cpu_seconds": 900.0, "peak_rss_bytes": 10**9},
    ]
    write_lines(folder / "stages.jsonl", rows)
    facts = [{"pass": "fit_ranges", "weights": 3}, {"pass": "fit_ranges", "seconds": 20.0}]
    write_lines(folder / "passes.jsonl", facts)
    return folder


def shared(folder, seconds, peak=8_000_000):
    row = {"stage": "calibrate", "seconds": seconds, "cpu_seconds": seconds, "peak_rss_bytes": peak}
    other = {"stage": "sample float", "seconds": 1.0, "cpu_seconds": 77.0, "peak_rss_bytes": 10**10}
    path = folder.with_name(f"shared-{folder.name}.stages.jsonl")
    write_lines(path, [row, other])


def test_a_run_is_charged_with_all_of_its_trajectories(tmp_path):
    folder = planted(tmp_path)
    shared(folder, 8.0)
    assert cost_of(folder) == {
        "cpu_seconds": 58.5,
        "peak_rss_bytes": 9_000_000,
        "where": {"trajectories": 8.0, "picking": 0.5, "fit_ranges": 10.0, "rest": 40.0},
    }


def test_the_trajectories_are_those_of_the_same_recipe_the_first_time(tmp_path):
    first = planted(tmp_path)
    wide = planted(tmp_path, "a-w8a8-published-1", bits={"weight": 8, "input": 8})
    other = planted(tmp_path, "a-w4a8-published-2", seed=2)
    shared(first, 8.0)
    shared(wide, 0.01)  # found there
    assert trajectories_stage(first)["cpu_seconds"] == 8.0
    assert trajectories_stage(wide)["cpu_seconds"] == 8.0
    assert trajectories_stage(other) == {}
    shared(other, 3.0)
    shared(first.with_name("removed-w4a8-1"), 99.0)  # nothing says what of
    assert trajectories_stage(other)["cpu_seconds"] == 3.0
    assert trajectories_stage(first)["cpu_seconds"] == 8.0


def test_seconds_of_passes_are_taken_at_the_rate_of_the_stage():
    """40 of 100 s are learning by the units, hence 20 of 50; the pass took 60, hence 10 capture."""
    facts = [
        {"pass": "fit_ranges", "seconds": 10.0},
        {"pass": "reconstruct", "phase": "weight", "unit": "a", "seconds": 15.0},
        {"pass": "reconstruct", "phase": "input", "unit": "a", "seconds": 25.0},
        {"pass": "reconstruct", "seconds": 60.0},
    ]
    assert parts_of(facts, STAGE) == {
        "fit_ranges": 5.0,
        "reconstruct: learning": 20.0,
        "reconstruct: capture": 10.0,
        "rest": 15.0,
    }


def test_a_method_without_reconstruction_and_an_interrupted_one():
    assert parts_of([{"pass": "fit_ranges", "seconds": 1.0}], STAGE) == {
        "fit_ranges": 0.5,
        "rest": 49.5,
    }
    # units of an earlier call, of which the pass counts nothing: what is not known is the rest
    facts = [
        {"pass": "reconstruct", "unit": "a", "seconds": 40.0},
        {"pass": "reconstruct", "seconds": 10.0},
    ]
    found = parts_of(facts, STAGE)
    assert found == {"reconstruct: learning": 5.0, "reconstruct: capture": 0.0, "rest": 45.0}


def test_the_machine_of_the_first_time_stays_until_the_run_is_made_again(tmp_path):
    folder = planted(tmp_path)
    shared(folder, 8.0)
    note_cost(folder, MACHINE)
    note_cost(folder, MACHINE | {"name": "another"})
    assert json.loads((folder / "cost.json").read_text())["machine"] == MACHINE
    rows = read_lines(folder / "stages.jsonl")
    write_lines(folder / "stages.jsonl", [*rows[:1], rows[1] | {"cpu_seconds": 40.0}])
    note_cost(folder, MACHINE | {"name": "another"})
    cost = json.loads((folder / "cost.json").read_text())
    assert cost["machine"]["name"] == "another" and cost["cpu_seconds"] == 48.5


def test_what_was_not_timed_is_said(tmp_path):
    folder = planted(tmp_path)
    with pytest.raises(ValueError, match="no shared-.* says what its trajectories took"):
        note_cost(folder, MACHINE)
    old = make_run(tmp_path / "tiny/old")
    with pytest.raises(ValueError, match="old/stages.jsonl has no CPU seconds"):
        note_cost(old, MACHINE)
    assert not (old / "cost.json").exists()

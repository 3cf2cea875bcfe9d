"""Results files: a line gives back what the run folder holds."""

import json

import pytest
from test_table import make_run

from base.files import PROJECT
from tinydm.recipe import RunConfig
from tinydm.report.results import (
    REPEATED,
    config_of,
    merge_results,
    read_results,
    read_run,
    results_text,
)


def content(result):
    return result.name, result.recipe, result.metrics, result.stages, result.cost


def test_a_line_gives_back_what_the_files_hold(tmp_path):
    folder = make_run(tmp_path / "tiny/m-w4a8-1")
    run = read_run(folder)
    assert run.name == "tiny/m-w4a8-1" and str(run) == str(folder)
    asked = run.metrics["protocol"]["asked"]
    same = {key: run.recipe[of] for key, of in REPEATED.items() if of in run.recipe}
    # what the recipe says too is left out; where it says something else, all is kept
    for protocol, kept in [(same, 1), (asked, len(asked) + 1)]:
        run.metrics["protocol"]["asked"] = protocol | {"device": "cpu"}
        text = results_text([run])
        assert len(json.loads(text)["metrics"]["protocol"]["asked"]) == kept
        (tmp_path / "one.jsonl").write_text(text)
        (again,) = read_results(tmp_path / "one.jsonl")
        assert content(again) == content(run)
        assert str(again) == "tiny/m-w4a8-1" and results_text([again]) == text


def test_what_calibration_cost_goes_along_where_it_was_measured(tmp_path):
    folder = make_run(tmp_path / "tiny/m-w4a8-1")
    assert "cost" not in json.loads(results_text([read_run(folder)]))
    (folder / "cost.json").write_text('{"cpu_seconds": 3.5}')
    run = read_run(folder)
    assert run.cost == {"cpu_seconds": 3.5}
    merge_results(tmp_path / "one.jsonl", [run])
    assert content(*read_results(tmp_path / "one.jsonl")) == content(run)


def test_runs_are_sorted_and_the_later_of_a_name_counts(tmp_path):
    runs = [read_run(make_run(tmp_path / f"tiny/{name}")) for name in "ba"]
    path = tmp_path / "some.jsonl"
    assert merge_results(path, runs) == 2
    newer = read_run(make_run(tmp_path / "new/tiny/b", fd=9.0))
    assert merge_results(path, [newer]) == 2
    found = read_results(path)
    assert [result.name for result in found] == ["tiny/a", "tiny/b"]
    assert found[1].metrics["quantized"]["scores"]["FD-cifar-resnet"] == 9.0


@pytest.mark.parametrize("line", ["{", "[]", '{"run": "a", "metrics": {}, "recipe": {}}'])
def test_a_damaged_file_is_said_with_its_line(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(results_text([read_run(make_run(tmp_path / "tiny/a"))]) + line + "\n")
    with pytest.raises(ValueError, match="bad.jsonl, line 2 is no run"):
        read_results(path)


def test_a_recipe_of_an_earlier_version_is_todays_with_defaults():
    inner = [{"fit_ranges": {"memory_gb": 4.0, "batch_size": 2}}]
    config = config_of(
        {"name": "tiny", "bits": {"weight": 3}, "passes": [{"segment_models": {"passes": inner}}]}
    )
    assert config.bits.weight == 3 and config.bits.input == RunConfig().bits.input
    assert config.passes == [{"segment_models": {"passes": [{"fit_ranges": {"batch_size": 2}}]}}]
    with pytest.raises(ValueError, match="unknown key 'bitz' in a recipe; did you mean 'bits'"):
        config_of({"bitz": {}})


def test_the_files_that_ship_can_be_read():
    files = sorted((PROJECT / "results").glob("*.jsonl"))
    assert {"as_published", "equal"} <= {file.stem for file in files} and len(files) >= 7
    for file in files:
        runs = read_results(file)
        assert len({run.name for run in runs}) == len(runs) > 0
        assert file.read_text() == results_text(runs)
        for run in runs:
            assert run.config.name == run.name.split("/")[0]

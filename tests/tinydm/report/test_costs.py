"""Tables of costs, from planted results whose means are known."""

import pytest
from test_table import cells, make_run

from base.config import load
from base.files import PROJECT, write_text
from tinydm.plan import CompareConfig
from tinydm.report import costs
from tinydm.report.costs import calibration_block, lines_of_plan, reaches, tables, times_less
from tinydm.report.results import merge_results, read_run

MACHINE = {"name": "Some", "isa": "AVX2", "threads": 1, "torch": "9", "date": "2026-01-02"}
LEARNED = {"trajectories": 8.0, "picking": 0.0, "reconstruct: learning": 90.4, "rest": 1.6}


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "models: [some/tiny.yaml]\nbits: [w4a8]\nmethods: [a, b]\n"
        "variants: {published: [], fast: [x=1]}\nseeds: [1, 2, 3]\n"
    )
    return load(CompareConfig, [path])


def result(tmp_path, name, cpu, psnr, where=LEARNED, machine=MACHINE):
    """SQNR is 15 dB in all of them, the memory 2 GB."""
    found = read_run(make_run(tmp_path / f"tiny/{name}"))
    found.metrics["paired"]["psnr_db"] = psnr
    found.cost = {"machine": machine, "cpu_seconds": cpu, "peak_rss_bytes": 2e9, "where": where}
    return found


def test_rows_have_means_and_deviations_and_are_held_to_the_published_form(tmp_path, plan):
    results = [
        result(tmp_path, "a-w4a8-published-1", 100.0, 30.0),
        result(tmp_path, "a-w4a8-published-2", 120.0, 34.0),
        result(tmp_path, "a-w4a8-published-3", 500.0, 90.0),
        result(tmp_path, "a-w4a8-fast-1", 20.0, 33.0),
        result(tmp_path, "a-w4a8-fast-2", 24.0, 31.5),
        result(tmp_path, "b-w4a8-published-1", 50.0, 20.0),
    ]
    lines = lines_of_plan(plan, results)
    assert [(line.name, line.seeds) for line in lines] == [
        ("a published", [1, 2, 3]),
        ("a fast", [1, 2]),
        ("b published", [1]),
    ]
    page = tables(plan, results)
    assert page[0] == "**Some, AVX2, 1 thread, torch 9, 2026-01-02.**"
    assert page[2] == "*tiny W4A8*"
    head, *rows = cells(
        "\n".join(
            page[: page.index("<details><summary>tiny W4A8: where the CPU seconds go</summary>")]
        )
    )
    assert head[:6] == ["method", "form", "CPU s", "peak MB", "SQNR dB", "PSNR dB"]
    assert head[6:] == ["CPU s less", "reaches it", "seeds"]
    # 20 and 24: 22 ± sqrt(8); of seeds 1 and 2 the published form has 110 s and 32 dB
    assert rows[1] == [
        "`a`", "fast", "22 ± 3", "2,000 ± 0", "15.00 ± 0.00", "32.25 ± 1.06", "5.0 times", "yes",
        "2 of 3",
    ]  # fmt: skip
    assert rows[0][-3:] == ["–", "–", "3 of 3"] and rows[2][-3:] == ["–", "–", "1 of 3"]
    assert page[-1] == (
        "Not measured: 6 of 12 runs (tiny w4a8: a fast 3, b published 2 3, b fast)."
    )


def test_a_form_that_falls_short_says_by_how_much(tmp_path, plan):
    results = [
        result(tmp_path, "a-w4a8-published-1", 100.0, 30.0),
        result(tmp_path, "a-w4a8-fast-1", 80.0, 29.5),
        result(tmp_path, "b-w4a8-fast-1", 80.0, 29.5),
    ]
    base, fast, alone = lines_of_plan(plan, results)
    assert reaches(fast, base) == "no: PSNR 0.50 dB below" and times_less(fast, base) == "1.2 times"
    assert reaches(alone, None) == "–" == times_less(alone, None)
    fast.seeds = [2]  # none in common
    assert reaches(fast, base) == "–" == times_less(fast, base)


def test_where_the_seconds_go(tmp_path, plan):
    said = {
        "trajectories": 8.0,
        "reconstruct: capture": 6.0,
        "reconstruct: learning": 30.0,
        "finetune": 20.0,
        "bypass_input": 0.1,
        "rest": 2.0,
    }
    results = [
        result(tmp_path, "a-w4a8-published-1", 100.0, 30.0),
        result(tmp_path, "a-w4a8-fast-1", 70.0, 30.0, said),
        result(tmp_path, "a-w4a8-fast-2", 70.0, 30.0, said | {"finetune": 30.0}),
    ]
    text = "\n".join(tables(plan, results))
    folded = text[text.index("<details>") : text.index("</details>")]
    head, *rows = cells(folded)
    columns = ["trajectories", "picking", "capture", "learning", "other passes", "rest"]
    assert head == ["", *columns]
    assert rows[0] == ["a published", "8", "0", "–", "90", "–", "2"]
    assert rows[1] == ["a fast", "8", "–", "6", "30", "finetune 25", "2"]


def test_machines_have_tables_of_their_own(tmp_path, plan):
    other = MACHINE | {"isa": "AVX2, ONEDNN_MAX_CPU_ISA=AVX2", "date": "2026-01-05"}
    results = [
        result(tmp_path, "a-w4a8-published-1", 100.0, 30.0),
        result(tmp_path, "a-w4a8-fast-1", 50.0, 30.0, machine=other),
        result(tmp_path, "a-w4a8-fast-2", 50.0, 30.0, machine=other | {"date": "2026-01-03"}),
    ]
    page = tables(plan, results)
    assert [line for line in page if line.startswith("**")] == [
        "**Some, AVX2, 1 thread, torch 9, 2026-01-02.**",
        "**Some, AVX2, ONEDNN_MAX_CPU_ISA=AVX2, 1 thread, torch 9, 2026-01-03 to 2026-01-05.**",
    ]
    assert not any("times" in line for line in page)  # not to be compared


def test_the_block_of_the_page_is_of_the_results_that_ship(tmp_path, plan, monkeypatch):
    write_text(tmp_path / costs.PLAN, (tmp_path / "plan.yaml").read_text())
    monkeypatch.setattr(costs, "PROJECT", tmp_path)
    assert calibration_block() == ["Not measured: 12 of 12 runs."]
    kept = result(tmp_path, "a-w4a8-published-1", 100.0, 30.0)
    merge_results(tmp_path / costs.RESULTS, [kept, read_run(make_run(tmp_path / "tiny/unpaid"))])
    assert "`a` | published | 100 |" in "\n".join(calibration_block())


def test_the_plan_that_ships_has_published_and_fast_forms():
    plan = load(CompareConfig, [PROJECT / costs.PLAN])
    assert list(plan.variants) == ["published", "fast"] and len(plan.seeds) == 3
    assert plan.variants["published"] == []

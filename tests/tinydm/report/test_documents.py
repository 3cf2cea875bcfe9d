"""The pages that ship against their sources, and blocks from planted runs."""

import pytest
from test_table import make_run

from base.files import PROJECT
from tinydm.report import documents
from tinydm.report.documents import BLOCK, rewritten
from tinydm.report.results import merge_results, read_results, read_run


@pytest.fixture
def project(tmp_path, monkeypatch):
    """results/equal.jsonl with a model tiny, beside a plan of three methods at two widths."""
    (tmp_path / "configs/compare").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("nothing generated\n")
    (tmp_path / "configs/compare/equal.yaml").write_text(
        "bits: [w8a8, w4a8]\nmethods: [first, second, third]"
    )
    runs = []
    for method, weight in [("third", 4), ("extra", 4), ("extra", 8), ("first", 4), ("first", 8)]:
        folder = tmp_path / f"runs/tiny/{method}-w{weight}a8-1000"
        runs.append(make_run(folder, method=method, bits={"weight": weight, "input": 8}))
    merge_results(tmp_path / "results/equal.jsonl", map(read_run, runs))
    monkeypatch.setattr(documents, "PROJECT", tmp_path)
    return tmp_path


def test_the_pages_that_ship_say_what_their_sources_say():
    pages = documents.stale_pages()
    generated = {"README", "results", "methods", "configuration", "calibration"}
    assert generated <= {path.stem for path in pages}
    assert [path.name for path, new in pages.items() if new] == []
    # and would say so
    page = (PROJECT / "docs/results.md").read_text()
    stale = page.replace("| tinydm | ", "| tinydm | 1", 1)
    assert stale != page == rewritten(stale)


def test_every_run_that_ships_is_shown():
    page = (PROJECT / "docs/results.md").read_text()
    shown = {found["name"] for found in BLOCK.finditer(page)}
    assert "<!-- calibration -->" in (PROJECT / "docs/calibration.md").read_text()
    for file in (PROJECT / "results").glob("*.jsonl"):
        if file.stem == "calibration":  # of that page
            continue
        models = {result.name.split("/")[0] for result in read_results(file)}
        assert {f"results/{file.stem}/{model}" for model in models} <= shown


def test_blocks_follow_the_plan(project):
    page = rewritten("before\n<!-- results/equal/tiny -->\nold\n<!-- end -->\nafter <!-- end -->\n")
    assert page.startswith("before\n<!-- results/equal/tiny -->\n| Method | W8A8 | W4A8 |\n")
    assert page.endswith("</details>\n<!-- end -->\nafter <!-- end -->\n") and "old" not in page
    cells = [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in page.splitlines()
        if line[:2] == "| "
    ]
    assert [line[:3] for line in cells[2:5]] == [
        ["first"] + ["30.00 / 0.2500"] * 2,
        ["extra"] + ["30.00 / 0.2500"] * 2,
        ["third", "–", "30.00 / 0.2500"],
    ]
    assert [line[2:4] for line in cells[7:]] == [
        ["32/32", "full precision"],
        ["8/8", "first"],
        ["8/8", "extra"],
        ["4/8", "first"],
        ["4/8", "third"],
        ["4/8", "extra"],
    ]
    assert "All columns, 6 rows</summary>" in page


def test_protocols_have_a_table_each_below_one_overview(project):
    folder = make_run(project / "runs/tiny/slow-w4a8-1000", method="slow", steps=50)
    merge_results(project / "results/equal.jsonl", [read_run(folder)])
    page = rewritten("<!-- results/equal/tiny -->\n<!-- end -->")
    assert page.count("| Method | W8A8 | W4A8 |") == 1 and "| slow | – | 30.00 / 0.2500 |" in page
    assert page.count("<details>") == 2
    assert "All columns, 2 rows<br>tiny, 500 images of seed 0, ddim 50 quad steps" in page


def test_the_small_table_has_the_mean_over_seeds(project, monkeypatch):
    for name, value in {"MODELS": ["tiny"], "WIDTHS": ["8/8", "4/8"], "METHODS": ["first"]}.items():
        monkeypatch.setattr(documents, name, value)
    folder = make_run(
        project / "runs/tiny/first-w4a8-1001",
        seed=2,
        method="first",
        bits={"weight": 4, "input": 8},
    )
    other = read_run(folder)
    other.metrics["paired"]["psnr_db"] = 34.0
    merge_results(project / "results/equal.jsonl", [other])
    lines = rewritten("<!-- results -->\n<!-- end -->").splitlines()
    assert lines[1] == "| `METHOD` | tiny W8A8 | tiny W4A8 |"
    # 30 and 34: mean 32, sample deviation sqrt(8)
    assert lines[3] == "| `first` | 30.0 | 32.0 ± 2.8 |"
    assert "over 1 or 2 calibration seeds" in lines[5]


def test_figures_that_pages_show_are_drawn(project, monkeypatch, capsys):
    drawn = {}
    monkeypatch.setattr(
        documents,
        "draw",
        lambda rows, path: drawn.update({path.name: [(r.bits, r.method) for r in rows]}),
    )
    (project / "configs/compare/ablation-few.yaml").write_text(
        "bits: [w4a8]\nmethods: [m]\nvariants: {b: [], a: []}"
    )
    runs = [
        make_run(
            project / f"runs/latent-compact/m-w4a8-{variant}-1000",
            method="m",
            variant=variant,
            segments=ord(variant),
        )
        for variant in "abc"
    ]
    merge_results(project / "results/ablation-few.jsonl", map(read_run, runs))
    page = project / "docs/page.md"
    page.write_text(
        "<!-- results/equal/tiny --><!-- end -->![x](compare-tiny.png) ![y](ablation-few.png)\n"
        "![z](other.png)\n<!-- results/equal/tiny -->\n<!-- end -->\n"
    )
    with pytest.raises(SystemExit) as ended:
        documents.run(["--check"])
    assert ended.value.code == 1 and "docs/page.md is stale" in capsys.readouterr().out
    assert "| third |" not in page.read_text() and not drawn
    documents.run([])
    full = ("32/32", "full precision")
    assert drawn == {
        "compare-tiny.png": [full, ("4/8", "first"), ("4/8", "third"), ("4/8", "extra")],
        "ablation-few.png": [full, *(("4/8", f"m ({variant})") for variant in "bac")],
    }
    assert "| third |" in page.read_text()
    with pytest.raises(SystemExit) as ended:
        documents.run(["--check"])
    assert ended.value.code == 0
    with pytest.raises(ValueError, match="expected nothing, --check, or results RUNS PLAN; found"):
        documents.run(["page.md", "more"])


def test_finished_runs_are_added_in_the_place_of_those_of_the_same_names(project, tmp_path):
    make_run(tmp_path / "new/tiny/first-w4a8-1000", fd=7.0, method="first")
    make_run(tmp_path / "new/tiny/second-w4a8-1000", method="second")
    (tmp_path / "new/tiny/float-1").mkdir()
    documents.run(["results", str(tmp_path / "new"), "equal"])
    found = {result.name: result for result in read_results(project / "results/equal.jsonl")}
    assert len(found) == 6 and "tiny/second-w4a8-1000" in found
    scores = found["tiny/first-w4a8-1000"].metrics["quantized"]["scores"]
    assert scores["FD-cifar-resnet"] == 7.0
    with pytest.raises(ValueError, match="other.yaml does not exist"):
        documents.run(["results", str(tmp_path / "new"), "other"])
    with pytest.raises(ValueError, match="docs holds no finished run"):
        documents.run(["results", str(project / "docs"), "equal"])

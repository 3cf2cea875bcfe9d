"""README.md against results/, and its blocks from planted run folders."""

import pytest
from test_table import make_run

from base.files import PROJECT
from tinydm.report import documents as readme
from tinydm.report.documents import BLOCK, rewritten


@pytest.fixture
def project(tmp_path, monkeypatch):
    """results/equal/tiny beside a plan of three methods at two widths."""
    runs = tmp_path / "results/equal/tiny"
    runs.mkdir(parents=True)
    for method, weight in [("third", 4), ("extra", 4), ("extra", 8), ("first", 4), ("first", 8)]:
        make_run(
            runs / f"{method}-w{weight}a8-1000", method=method, bits={"weight": weight, "input": 8}
        )
    (tmp_path / "configs/compare").mkdir(parents=True)
    (tmp_path / "configs/compare/equal.yaml").write_text(
        "bits: [w8a8, w4a8]\nmethods: [first, second, third]"
    )
    monkeypatch.setattr(readme, "PROJECT", tmp_path)
    return tmp_path


def test_the_readme_says_what_results_say():
    page = (PROJECT / "README.md").read_text()
    stale = page.replace("| tinydm | ", "| tinydm | 1", 1)
    assert len(BLOCK.findall(page)) >= 3 and stale != page == rewritten(stale)


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
    assert "All columns, 6 rows" in page


def test_figures_that_the_page_shows_are_drawn(project, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        readme, "draw", lambda rows, path: drawn.update({path: [(r.bits, r.method) for r in rows]})
    )
    (project / "configs/compare/ablation-few.yaml").write_text(
        "bits: [w4a8]\nmethods: [m]\nvariants: {b: [], a: []}"
    )
    runs = project / "results/ablation-few/latent-compact"
    runs.mkdir(parents=True)
    for variant in "abc":
        make_run(
            runs / f"m-w4a8-{variant}-1000", method="m", variant=variant, segments=ord(variant)
        )
    page = project / "page.md"
    page.write_text(
        "<!-- results/equal/tiny --><!-- end -->![x](docs/compare-tiny.png) "
        "![y](docs/ablation-few.png)\n"
        "![z](docs/other.png)\n<!-- results/equal/tiny -->\n<!-- end -->\n"
    )
    readme.run([str(page)])
    full = ("32/32", "full precision")
    assert drawn == {
        project / "docs/compare-tiny.png": [
            full,
            ("4/8", "first"),
            ("4/8", "third"),
            ("4/8", "extra"),
        ],
        project / "docs/ablation-few.png": [
            full,
            *(("4/8", f"m ({variant})") for variant in "bac"),
        ],
    }
    assert "| third |" in page.read_text()
    with pytest.raises(ValueError, match="expected one Markdown file, found page.md more"):
        readme.run(["page.md", "more"])

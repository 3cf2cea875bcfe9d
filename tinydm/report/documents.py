"""Write what README.md shows of results/ anew, tables and figures:  python scripts/readme.py README.md

A block of the file between <!-- results/PLAN/MODEL --> and <!-- end --> holds the overview and,
folded, all columns of the run folders there, in the order of configs/compare/PLAN.yaml. Figures
that it shows: docs/compare-MODEL.png (W4A8 and W4A4 of equal.yaml), docs/ablation-NAME.png."""

import re
from itertools import product
from pathlib import Path

from base.config import load
from base.files import PROJECT, write_text
from tinydm.compare import CompareConfig, draw
from tinydm.report.table import assemble, lines_of, row_of, tables

BLOCK = re.compile(r"<!-- results/(\S+)/(\S+) -->\n.*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(r"\((docs/(compare|ablation)-(\S+)\.png)\)")
DRAWN = "32/32", "4/8", "4/4"


def run(arguments):
    path, *more = arguments
    if more or not Path(path).is_file():
        raise ValueError(f"expected one Markdown file, found {' '.join(arguments)}")
    page = Path(path).read_text()
    write_text(path, rewritten(page))
    for figure, kind, name in FIGURE.findall(page):
        if kind == "ablation":
            rows = rows_of(f"ablation-{name}", "latent-compact")
        else:
            rows = [row for row in rows_of("equal", name) if row.bits in DRAWN]
        draw(rows, PROJECT / figure)


def rewritten(page):
    """The text with its blocks made anew."""
    return BLOCK.sub(lambda found: block(*found.groups()), page)


def block(plan, model):
    *overview, (_, head, lines) = tables(rows_of(plan, model))
    folded = [
        "",
        f"<details><summary>All columns, {len(lines)} rows</summary>",
        "",
        *lines_of(head, lines),
        "",
        "</details>",
    ]
    return "\n".join(
        [
            f"<!-- results/{plan}/{model} -->",
            *(line for _, *part in overview for line in lines_of(*part)),
            *folded,
            "<!-- end -->",
        ]
    )


def rows_of(plan, model):
    """The rows of results/PLAN/MODEL in the order of the plan, methods that it leaves out below the
    others."""
    listed = load(CompareConfig, [PROJECT / f"configs/compare/{plan}.yaml"])
    found = {
        path.parent.name: path.parent
        for path in (PROJECT / "results" / plan / model).glob("*/metrics.json")
    }
    methods = dict.fromkeys([*listed.methods, *sorted(name.split("-")[0] for name in found)])
    names = [
        "-".join(filter(None, (method, bits, variant, str(seed))))
        for bits, method, variant, seed in product(
            listed.bits, methods, listed.variants or [""], listed.seeds
        )
    ]
    order = [*(name for name in names if name in found), *sorted(found.keys() - set(names))]
    return assemble([row_of(found[name]) for name in order])

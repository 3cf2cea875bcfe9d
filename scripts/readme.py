"""Write the measured tables of README.md, and their figures, anew from results/:  python scripts/readme.py README.md

A block of the file between <!-- results/PLAN/MODEL --> and <!-- end --> holds the overview and, folded, all columns of
the run folders there, in the order of configs/compare/PLAN.yaml. The figures are of W4A8 and W4A4 at equal widths.
"""
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.diffusion import PROJECT  # noqa: E402
from quant.config import load, read_yaml  # noqa: E402
from quant.files import write_text  # noqa: E402
from scripts.cli import main  # noqa: E402
from scripts.compare import CompareConfig, draw, yaml_path  # noqa: E402
from scripts.table import assemble, lines_of, row_of, tables  # noqa: E402

BLOCK = re.compile(r"<!-- results/(\S+)/(\S+) -->\n.*?<!-- end -->", re.DOTALL)
DRAWN = "32/32", "4/8", "4/4"


def run(arguments):
    path, *more = arguments
    if more or not Path(path).is_file():
        raise ValueError(f"expected one Markdown file, found {' '.join(arguments)}")
    page = Path(path).read_text()
    write_text(path, rewritten(page))
    for plan, model in BLOCK.findall(page):
        if plan == "equal":
            draw([row for row in rows_of(plan, model) if row.bits in DRAWN], PROJECT / f"docs/compare-{model}.png")


def rewritten(page):
    """The text with its blocks made anew."""
    return BLOCK.sub(lambda found: block(*found.groups()), page)


def block(plan, model):
    *overview, (_, head, lines) = tables(rows_of(plan, model))
    folded = ["", f"<details><summary>All columns, {len(lines)} rows</summary>", "", *lines_of(head, lines), "",
              "</details>"]
    return "\n".join([f"<!-- results/{plan}/{model} -->", *(line for _, *part in overview for line in lines_of(*part)),
                      *folded, "<!-- end -->"])


def rows_of(plan, model):
    """The rows of results/PLAN/MODEL, widths and methods as the plan lists them, what it leaves out at the end."""
    listed = load(CompareConfig, [PROJECT / f"configs/compare/{plan}.yaml"])
    bits = ["32/32", *("{weight}/{input}".format(**read_yaml(yaml_path("bits", name))["bits"]) for name in listed.bits)]
    methods = ["full precision", *listed.methods]
    folders = sorted(path.parent for path in (PROJECT / "results" / plan / model).glob("*/metrics.json"))

    def place(row):
        return bits.index(row.bits), methods.index(row.method) if row.method in methods else len(methods), row.method
    return sorted(assemble([row_of(folder) for folder in folders]), key=place)


if __name__ == "__main__":
    main(run)

"""Write the generated parts of README.md and docs/ anew:

    python scripts/docs.py                         all pages and figures
    python scripts/docs.py --check                 writes nothing, ends with 1 where a page is stale
    python scripts/docs.py results RUNS PLAN       adds the finished runs of a comparison's folder
                                                   RUNS to results/PLAN.jsonl, then writes all

A page holds blocks between <!-- NAME --> and <!-- end -->, everything else in it is written by
hand. NAME is results (the small table), results/PLAN/MODEL (overview and, folded, all columns of
results/PLAN.jsonl, in the order of configs/compare/PLAN.yaml), methods (of configs/method),
integers (what of each runs on int8), calibration (what it costs, of results/calibration.jsonl),
passes, builders, or keys MODULE.CLASS (of that dataclass).
Figures that a page shows are drawn too: compare-MODEL.png (W4A8 and W4A4 of equal.yaml) and
ablation-NAME.png."""

import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from base.config import load
from base.files import PROJECT, write_text
from tinydm.plan import CompareConfig, run_name
from tinydm.report import table
from tinydm.report.chart import draw
from tinydm.report.costs import calibration_block
from tinydm.report.integers import integers_block
from tinydm.report.reference import builders_block, keys_block, methods_block, passes_block
from tinydm.report.results import merge_results, read_results, read_run

BLOCK = re.compile(
    r"<!-- (?P<name>results(?:/\S+/\S+)?|methods|integers|calibration|passes|builders|keys \S+)"
    r" -->\n"
    r".*?<!-- end -->",
    re.DOTALL,
)
FIGURE = re.compile(r"\((?:docs/)?((?:compare|ablation)-\S+)\.png\)")
DRAWN = "32/32", "4/8", "4/4"
# of the small table
MODELS = "cifar10-compact", "latent-compact", "latent-compact-class"
WIDTHS = "4/8", "4/4"
METHODS = "minmax", "qdiffusion", "ptqd", "edadm", "tfmq", "tinydm"


def run(arguments: list[str]) -> None:
    if arguments[:1] == ["results"] and len(arguments) == 3:
        number = add_results(*arguments[1:])
        print(f"docs: {number} runs in results/{arguments[2]}.jsonl")
    elif arguments not in ([], ["--check"]):
        found = " ".join(arguments)
        raise ValueError(f"expected nothing, --check, or results RUNS PLAN; found {found}")
    pages = stale_pages()
    for path, text in pages.items():
        print(f"docs: {path.relative_to(PROJECT)} is {'stale' if text else 'as it should be'}")
    if arguments == ["--check"]:
        raise SystemExit(int(any(pages.values())))
    for path, text in pages.items():
        if text:
            write_text(path, text)
    for path in draw_figures(pages):
        print(f"docs: {path.relative_to(PROJECT)} is drawn")


def stale_pages() -> dict[Path, str]:
    """Every page with a block or a figure -> what it should be, "" where it is that already."""
    pages = {}
    for path in [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]:
        text = path.read_text()
        if BLOCK.search(text) or FIGURE.search(text):
            new = rewritten(text)
            pages[path] = "" if new == text else new
    return pages


def add_results(runs: str, plan: str) -> int:
    """Adds the finished runs of a comparison's folder to results/PLAN.jsonl, in the place of those
    of the same names; returns how many there are. Raises ValueError for none, or no such plan."""
    load(CompareConfig, [PROJECT / f"configs/compare/{plan}.yaml"])
    found = [read_run(path.parent) for path in sorted(Path(runs).glob("*/*/metrics.json"))]
    if not found:
        raise ValueError(f"{runs} holds no finished run (MODEL/RUN/metrics.json)")
    return merge_results(PROJECT / f"results/{plan}.jsonl", found)


def draw_figures(pages: Sequence[Path] | dict[Path, str]) -> list[Path]:
    """Draws the figures that pages show; returns their paths."""
    shown = {name: None for page in pages for name in FIGURE.findall(page.read_text())}
    for name in shown:
        kind, _, rest = name.partition("-")
        if kind == "ablation":
            rows = rows_of(name, "latent-compact")
        else:
            rows = [row for row in rows_of("equal", rest) if row.bits in DRAWN]
        draw(rows, PROJECT / f"docs/{name}.png")
    return [PROJECT / f"docs/{name}.png" for name in shown]


def rewritten(page: str) -> str:
    """A page with its blocks made anew."""
    return BLOCK.sub(lambda found: _block(found["name"]), page)


def _block(name):
    word, _, rest = name.partition(" ")
    if word == "keys":
        lines = keys_block(rest)
    elif "/" in word:
        lines = results_block(*word.split("/")[1:])
    else:
        lines = BLOCKS[word]()
    return "\n".join([f"<!-- {name} -->", *lines, "<!-- end -->"])


def results_block(plan: str, model: str) -> list[str]:
    """The overview of a model's rows and, folded, all columns: a table for each protocol."""
    rows = rows_of(plan, model)
    _, head, body = table.overview("", rows)
    lines = table.lines_of(head, body)
    whole = [part for part in table.tables(rows) if part[1][0] == "Model"]
    for caption, head, body in whole:
        more = f"<br>{caption}" if len(whole) > 1 else ""
        summary = f"<details><summary>All columns, {len(body)} rows{more}</summary>"
        lines += ["", summary, "", *table.lines_of(head, body), "", "</details>"]
    return lines


def small_table() -> list[str]:
    """PSNR of a few methods on the models that ship."""
    found, body, seeds = {}, [], set()
    for model in MODELS:
        found |= {(model, row.bits, row.method): row for row in rows_of("equal", model)}
    columns = list(product(MODELS, WIDTHS))
    head = ["`METHOD`", *(f"{model} {table.words_of(bits)}" for model, bits in columns)]
    for method in METHODS:
        rows = [found[(*column, method)] for column in columns]
        body.append([f"`{method}`", *(table.mean_and_spread(row, "PSNR dB", 1) for row in rows)])
        seeds |= {len(row.runs) for row in rows}
    seeds = " or ".join(map(str, sorted(seeds)))
    return [
        *table.lines_of(head, body),
        "",
        f"PSNR in dB to the images of full precision, mean ± sample deviation over {seeds} "
        "calibration seeds.",
    ]


def rows_of(plan: str, model: str) -> list[table.Row]:
    """The rows of a model in results/PLAN.jsonl in the order of the plan, other methods last."""
    listed = load(CompareConfig, [PROJECT / f"configs/compare/{plan}.yaml"])
    found = {}
    for result in read_results(PROJECT / f"results/{plan}.jsonl"):
        folder, _, name = result.name.partition("/")
        if folder == model:
            found[name] = result
    methods = dict.fromkeys([*listed.methods, *sorted(name.split("-")[0] for name in found)])
    cells = product(listed.bits, methods, listed.variants or [""], listed.seeds)
    names = [run_name(method, bits, variant, seed) for bits, method, variant, seed in cells]
    order = [*(name for name in names if name in found), *sorted(found.keys() - set(names))]
    return table.assemble([table.row_of(found[name]) for name in order])


BLOCKS = {
    "results": small_table,
    "methods": methods_block,
    "integers": integers_block,
    "calibration": calibration_block,
    "passes": passes_block,
    "builders": builders_block,
}

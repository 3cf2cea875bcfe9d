"""Tables of what calibration costs and what comes out: each method in its published form and in
others, by the results of `tinydm benchmark calibration`."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

from base.config import load
from base.files import PROJECT
from tinydm.benchmark.machine import label
from tinydm.plan import CompareConfig, run_name
from tinydm.report.results import Result, read_results
from tinydm.report.table import Row, lines_of, mean_and_spread, quantized_numbers, words_of

PLAN, RESULTS = "configs/compare/calibration.yaml", "results/calibration.jsonl"
BASE = "published"  # the form that others are held to
# column -> decimals
COST = {"CPU s": 0, "peak MB": 0}
QUALITY = {"SQNR dB": 2, "PSNR dB": 2}
NOTHING = "–"
# what the seconds are spent on -> column; all else is one column, named
COLUMNS = {
    "trajectories": "trajectories",
    "picking": "picking",
    "fit_ranges": "ranges",
    "reconstruct: capture": "capture",
    "reconstruct: learning": "learning",
}
LEGEND = """CPU s: CPU seconds of `calibrate` and `quantize`, model loading and full-precision
trajectories included (these are shared by runs; each is charged with all of them). Peak MB: 1e6
bytes, resident, the larger of the two stages. SQNR: of the predicted noise, mean over the steps;
PSNR: to the images of full precision, same seeds. Mean ± sample deviation over the calibration
seeds. Reaches it: both means are at least those of the published form, over the seeds that both
have; "less" is in CPU seconds, over the same."""


@dataclass
class Line(Row):
    """A method in one form: `numbers` of its seeds in turn, and those that were asked for."""

    form: str = ""
    seeds: list[int] = field(default_factory=list)
    asked: int = 0

    @property
    def group(self) -> tuple[str, str]:
        """What lines of the same stand in one table."""
        return self.model, self.bits

    @property
    def name(self) -> str:
        return f"{self.method} {self.form}".strip()


def calibration_block() -> list[str]:
    """The generated part of docs/calibration.md."""
    plan, path = load(CompareConfig, [PROJECT / PLAN]), PROJECT / RESULTS
    return tables(plan, read_results(path) if path.exists() else [])


def tables(plan: CompareConfig, results: Iterable[Result]) -> list[str]:
    """Cost and quality of the runs of a plan, then where the seconds went, for each machine, model
    and widths; then what is not measured."""
    results = {result.name: result for result in results if result.cost}
    machines: dict[str, list[Result]] = {}
    for result in results.values():
        machines.setdefault(label(result.cost["machine"]), []).append(result)
    blocks = [_block(machine, plan, own) for machine, own in machines.items()]
    return [line for block in blocks for line in block] + missing(plan, results)


def lines_of_plan(plan: CompareConfig, results: Iterable[Result]) -> list[Line]:
    """A line for each method and form of which there is a result, in the order of the plan."""
    found, lines = {result.name: result for result in results}, []
    for model, bits, method, form, named in _rows(plan):
        there = {seed: found[name] for seed, name in named.items() if name in found}
        if there:
            runs = list(there.values())
            widths = runs[0].recipe["bits"]
            line = Line(model, 0, f"{widths['weight']}/{widths['input']}", method, runs=runs)
            line.form, line.seeds, line.asked = form, list(there), len(named)
            line.numbers = [_numbers(result) for result in runs]
            lines.append(line)
    return lines


def _rows(plan) -> Iterator[tuple]:
    """(model, bits, method, form, {seed: name of the run}) of a plan."""
    forms = [str(form) for form in plan.variants or [""]]
    for model, bits, method, form in product(plan.models, plan.bits, plan.methods, forms):
        names = {s: f"{_stem(model)}/{run_name(method, bits, form, s)}" for s in plan.seeds}
        yield _stem(model), _stem(bits), _stem(method), form, names


def _stem(name):
    return name.rpartition("/")[2].removesuffix(".yaml")


def _numbers(result):
    quality = quantized_numbers(result)
    costs = {"CPU s": result.cost["cpu_seconds"], "peak MB": result.cost["peak_rss_bytes"] / 1e6}
    return costs | {column: quality[column] for column in QUALITY}


def _block(machine, plan, results):
    """The tables of one machine."""
    lines = lines_of_plan(plan, results)
    if not lines:
        return []
    facts = [result.cost["machine"] for result in results]
    torch = ", ".join(sorted({one["torch"] for one in facts}))
    dates = sorted({one["date"] for one in facts})
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    text = [f"**{machine}, torch {torch}, {when}.**", ""]
    for group in dict.fromkeys(line.group for line in lines):
        own = [line for line in lines if line.group == group]
        title = f"{group[0]} {words_of(group[1])}"
        text += [f"*{title}*", "", *cost_table(own), "", *where_table(title, own), ""]
    return text


def cost_table(lines: Sequence[Line]) -> list[str]:
    """Cost and quality of the lines of one group."""
    columns = {**COST, **QUALITY}
    head = ["method", "form", *columns, "CPU s less", "reaches it", "seeds"]
    body = []
    for line in lines:
        base = next((b for b in lines if (b.method, b.form) == (line.method, BASE)), None)
        body.append(
            [
                f"`{line.method}`",
                line.form,
                *(mean_and_spread(line, column, digits) for column, digits in columns.items()),
                times_less(line, base),
                reaches(line, base),
                f"{len(line.seeds)} of {line.asked}",
            ]
        )
    return lines_of(head, body)


def paired(line: Line, base: Line | None, column: str) -> tuple[float, float] | None:
    """The means of a line and of its published form over the seeds that both have; None for the
    published form itself, or where they share none."""
    if base is None or line is base:
        return None
    both = [seed for seed in line.seeds if seed in base.seeds]
    pairs = [
        sum(one.numbers[one.seeds.index(seed)][column] for seed in both) / len(both)
        for one in (line, base)
        if both
    ]
    return (pairs[0], pairs[1]) if pairs else None


def times_less(line: Line, base: Line | None) -> str:
    """How many times fewer CPU seconds than the published form."""
    pair = paired(line, base, "CPU s")
    return f"{pair[1] / pair[0]:.1f} times" if pair else NOTHING


def reaches(line: Line, base: Line | None) -> str:
    """Whether both scores are at least those of the published form; else by how much they fall
    short."""
    pairs = {column: paired(line, base, column) for column in QUALITY}
    if not all(pairs.values()):
        return NOTHING
    short = [
        f"{column.removesuffix(' dB')} {before - now:.2f} dB below"
        for column, (now, before) in pairs.items()
        if now < before
    ]
    return f"no: {', '.join(short)}" if short else "yes"


def where_table(title: str, lines: Sequence[Line]) -> list[str]:
    """Where the CPU seconds of each line went, mean over its seeds, folded."""
    rows = [_where(line) for line in lines]
    columns = [name for key, name in COLUMNS.items() if any(key in row for row in rows)]
    keys = {name: key for key, name in COLUMNS.items()}
    body = []
    for line, row in zip(lines, rows):
        others = {key: s for key, s in row.items() if key not in COLUMNS and key != "rest"}
        named = ", ".join(f"{key} {s:.0f}" for key, s in others.items() if s >= 0.5)
        cells = [f"{row[keys[c]]:.0f}" if keys[c] in row else NOTHING for c in columns]
        body.append([line.name, *cells, named or NOTHING, f"{row.get('rest', 0):.0f}"])
    return [
        f"<details><summary>{title}: where the CPU seconds go</summary>",
        "",
        *lines_of(["", *columns, "other passes", "rest"], body),
        "",
        "</details>",
    ]


def _where(line):
    """CPU seconds by what they were spent on, mean over the seeds."""
    spent = [result.cost["where"] for result in line.runs]
    keys = dict.fromkeys(key for where in spent for key in where)
    return {key: sum(where.get(key, 0) for where in spent) / len(spent) for key in keys}


def missing(plan: CompareConfig, results: Iterable[str]) -> list[str]:
    """A sentence about the runs of a plan that are not among the names `results`: none, if all
    are."""
    gaps, count, asked = {}, 0, 0
    for model, bits, method, form, named in _rows(plan):
        absent = [str(seed) for seed, name in named.items() if name not in results]
        asked, count = asked + len(named), count + len(absent)
        seeds = absent if len(absent) < len(named) else []  # without: all of them
        if absent:
            gaps.setdefault(f"{model} {bits}", []).append(" ".join([method, form, *seeds]).strip())
    if not count:
        return []
    text = "; ".join(f"{group}: {', '.join(rows)}" for group, rows in gaps.items())
    return [f"Not measured: {count} of {asked} runs" + f" ({text})" * (count < asked) + "."]

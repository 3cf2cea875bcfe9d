"""Tables of evaluated runs:  python scripts/table.py RUN [RUN ...] [out=FILE.md]

RUN is a run folder or a results file, as results/equal.jsonl. Rows that share a table share their
protocol (model, image count, sampler, reference, extractor); another protocol gets a table of its
own. Runs that differ by their calibration seed alone are one row: mean and spread."""

import csv
import io
import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from base.config import split_arguments
from base.files import write_text
from tinydm.identity import identity
from tinydm.recipe import RunConfig
from tinydm.report.results import Result, read_results, read_run
from tinydm.run_folder import open_run

LEGEND = """MB = 1e6 bytes. FD to FP32, PSNR, SSIM and LPIPS compare with the full-precision images
of the same seeds; SQNR is that of the predicted noise, the mean over the steps. GBOPs: 1e9 bit
operations of one image and run of the network (guidance takes two a step), the sum over layers of
multiply-adds x weight bits x input bits (full precision: 32 x 32). Calibration s: the stages
calibrate and quantize; peak MB: the larger of their two peaks, of GPU memory where a GPU was used,
else of the process. Several calibration seeds: mean ± sample standard deviation."""
FIXED = ["Model", "Timesteps", "Bit-width W/A", "Method", "Seeds"]
# columns in the field's order
SCORES = ["FID", "FD", "sFID", "sFD", "IS", "precision", "recall", "KID"]
# decimals by the word that a column begins with, 2 for others; FP32 of "FD-... to FP32"
DIGITS = {"calibration": 0, "peak": 0, "SQNR": 1, "precision": 3, "recall": 3, "SSIM": 3}
DIGITS |= {"KID": 4, "FP32": 4, "LPIPS": 4}
CALIBRATION = ("calibrate", "quantize")
# caption, head, lines of texts
Table = tuple[str, list[str], list[list[str]]]


@dataclass
class Row:
    """A line of a table: `runs` are those of its calibration seeds, `numbers` holds {column: number
    or None} of each; a row without numbers says in `note` why."""

    model: str
    steps: int
    bits: str
    method: str
    protocol: str = ""
    recipe: str = ""
    runs: list[Result] = field(default_factory=list)
    numbers: list[dict[str, float | None]] = field(default_factory=list)
    note: str = ""

    def fixed(self) -> list[Any]:
        return [self.model, self.steps, self.bits, self.method, len(self.runs) or ""]

    def values(self, column: str) -> list[float]:
        return [n[column] for n in self.numbers if n.get(column) is not None]

    def mean(self, column: str) -> float | None:
        values = self.values(column)
        return statistics.mean(values) if values else None

    def spread(self, column: str) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        values = self.values(column)
        return statistics.stdev(values) if len(values) > 1 else None


def run(arguments: list[str]) -> None:
    places, words = split_arguments(arguments)
    if not places or any(not w.startswith("out=") for w in words):
        raise ValueError(f"expected run folders and out=FILE, found {' '.join(arguments)}")
    page = markdown(assemble([row_of(result) for result in read_places(places)]))
    print(page)
    if words:
        write_text(words[0].removeprefix("out="), page)


def read_places(places: Iterable[str]) -> list[Result]:
    """Reads run folders and results files. Beside run folders lie what they share (float-*,
    trajectory-*), which is passed over; one place counts once, however it is spelled. Raises
    ValueError where a run was not evaluated."""
    files = [place for place in places if place.endswith(".jsonl")]
    folders = [place for place in places if not place.endswith(".jsonl")]
    folders = [f for f in folders if (Path(f) / "config.yaml").exists()] or folders
    found = {Path(folder).resolve(): folder for folder in folders}
    for folder in found.values():
        if not (Path(folder) / "metrics.json").exists():
            open_run(folder).need("metrics.json", "evaluate")
    results = [read_run(folder) for folder in found.values()]
    for file in dict.fromkeys(Path(file).resolve() for file in files):
        results += read_results(file)
    return results


def row_of(result: Result) -> Row:
    """The row of one evaluated run."""
    numbers = {"runs": [result], "numbers": [quantized_numbers(result)]}
    return empty_row(result.config, protocol=protocol(result.metrics), **numbers)


def empty_row(config: RunConfig, **more: Any) -> Row:
    """The row of a recipe, which leaves out its seeds and what changes no artefact."""
    seedless = replace(config, seed=0, calibration=replace(config.calibration, seed=0))
    recipe = json.dumps(identity(seedless), sort_keys=True)
    method = config.method + (f" ({config.variant})" if config.variant else "")
    bits = f"{config.bits.weight}/{config.bits.input}"
    return Row(config.name, config.sampling.steps, bits, method, recipe=recipe, **more)


def full_precision_row(result: Result) -> Row:
    """The row of the unquantized model that a run was compared with."""
    metrics, asked = result.metrics, result.metrics["protocol"]["asked"]
    numbers = {
        "Size MB": metrics["sizes"]["float_bytes"] / 1e6,
        **scores(metrics["float"]["scores"]),
        "GBOPs": metrics["bit_operations"]["float"] / 1e9,
    }
    fixed = asked["model"], asked["sampling"]["steps"], "32/32", "full precision"
    return Row(*fixed, protocol(metrics), numbers=[numbers])


def quantized_numbers(result: Result) -> dict[str, float | None]:
    """Column -> number, in the order of the columns."""
    metrics, paired = result.metrics, result.metrics["paired"]
    sqnr = [step["sqnr_db"] for step in metrics["sqnr_db_per_step"]]
    stages = [row for row in result.stages if row["stage"] in CALIBRATION]
    peaks = [row.get("peak_cuda_bytes", row.get("peak_rss_bytes", 0)) for row in stages]
    return {
        "Size MB": metrics["sizes"]["quantized_bytes"] / 1e6,
        **scores(metrics["quantized"]["scores"]),
        **{name: value for name, value in paired.items() if name.endswith(" to FP32")},
        "PSNR dB": paired["psnr_db"],
        "SSIM": paired["ssim"],
        **{name: value for name, value in paired.items() if name.startswith("LPIPS")},
        "SQNR dB": statistics.mean(sqnr),
        "GBOPs": metrics["bit_operations"]["quantized"] / 1e9,
        "calibration s": sum(row["seconds"] for row in stages) or None,
        "peak MB": max(peaks, default=0) / 1e6 or None,
    }


def scores(found: dict[str, float]) -> dict[str, float]:
    """Those of a distribution in the order of the columns, without their deviations."""
    names = [name for name in found if not name.endswith("-std")]
    names.sort(key=lambda name: SCORES.index(name.split("-")[0]))
    return {name: found[name] for name in names}


def protocol(metrics: dict[str, Any]) -> str:
    """What two rows must share, as one line."""
    asked, scored = metrics["protocol"]["asked"], metrics["protocol"]["scores"]
    s, made = asked["sampling"], asked["provenance"]
    wanted = "".join(f", {key} {s[key]}" for key in ("classes", "prompts") if s.get(key))
    return (
        f"{asked['model']}{wanted}, {scored['count']} images of seed {s['seed']}, {s['sampler']} "
        f"{s['steps']} {s['skip']} steps, eta {s['eta']}, guidance {asked['guidance']['scale']}, "
        f"{asked['weights']} weights, reference {scored.get('reference')}, extractor "
        f"{scored.get('extractor')}, {scored.get('tool')}, torch {made['versions']['torch']} on "
        f"{made['device']}"
    )


def assemble(rows: Iterable[Row]) -> list[Row]:
    """Rows of the tables: the seeds of a recipe in one, below the full-precision model's."""
    rows, merged = list(rows), {}
    full = {row.protocol: row.runs[0] for row in rows if row.runs}
    for row in [*map(full_precision_row, full.values()), *rows]:
        key = row.model, row.steps, row.bits, row.method, row.protocol, row.recipe
        merged.setdefault(key, []).append(row)
    return [
        Row(
            *key,
            runs=[result for row in group for result in row.runs],
            numbers=[numbers for row in group for numbers in row.numbers],
            note="; ".join(dict.fromkeys(row.note for row in group if row.note)),
        )
        for key, group in merged.items()
    ]


def tables(rows: Sequence[Row]) -> list[Table]:
    """A table for each protocol and, before one of several widths, an overview."""
    parts = []
    for line in dict.fromkeys(row.protocol for row in rows):
        part = [row for row in rows if row.protocol == line]
        if len({row.bits for row in part if row.runs}) > 1:
            parts.append(overview(line, part))
        columns, notes = columns_of(part), any(row.note for row in part)
        head, lines = FIXED + columns + ["Note"] * notes, []
        for row in part:
            numbers = [text(row, column) for column in columns]
            lines.append([*map(str, row.fixed()), *numbers, *[row.note] * notes])
        parts.append((line or "nothing was evaluated", head, lines))
    return parts


def overview(line: str, rows: Sequence[Row]) -> Table:
    """Methods by widths: how near the images come to those of full precision."""
    rows = [row for row in rows if row.runs]
    shown = ["PSNR dB", *(name for name in columns_of(rows) if name.endswith(" to FP32"))]
    bits, cells = list(dict.fromkeys(row.bits for row in rows)), {}
    for row in rows:
        numbers = " / ".join(text(row, name) for name in shown)
        cells.setdefault((row.method, row.bits), []).append(numbers)
    lines = [
        [method, *("; ".join(cells.get((method, width), ["–"])) for width in bits)]
        for method in dict.fromkeys(row.method for row in rows)
    ]
    return f"{' / '.join(shown)}; {line}", ["Method", *map(words_of, bits)], lines


def words_of(bits: str) -> str:
    """Widths as papers write them: 4/8 is W4A8."""
    return f"W{bits.replace('/', 'A')}"


def columns_of(rows: Iterable[Row]) -> list[str]:
    """The columns of all rows, in the order of the row that has most of them."""
    fullest_first = sorted((n for row in rows for n in row.numbers), key=len, reverse=True)
    return list(dict.fromkeys(name for numbers in fullest_first for name in numbers))


def text(row: Row, column: str) -> str:
    """Mean, and spread where there is one; a dash where nothing was measured."""
    word = re.split("[- ]", column.split(" to ")[-1])[0]
    return mean_and_spread(row, column, DIGITS.get(word, 2))


def mean_and_spread(row: Row, column: str, digits: int) -> str:
    """The same with so many decimals."""
    mean, spread = row.mean(column), row.spread(column)
    if mean is None:
        return "–"
    return f"{mean:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if spread is not None else "")


def markdown(rows: Sequence[Row]) -> str:
    parts = [
        "\n".join([f"Protocol: {line}.", "", *lines_of(head, lines)])
        for line, head, lines in tables(rows)
    ]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def lines_of(head: list[str], lines: list[list[str]]) -> list[str]:
    """A table in Markdown, line by line."""
    return [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        for cells in (head, ["---"] * len(head), *lines)
    ]


def csv_text(rows: Sequence[Row]) -> str:
    """All rows with all digits: mean and spread of every column, note, runs and protocol."""
    columns, buffer = columns_of(rows), io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    pairs = [name for column in columns for name in (column, f"{column} spread")]
    writer.writerow([*FIXED, *pairs, "Note", "Runs", "Protocol"])
    for row in rows:
        numbers = [value for column in columns for value in (row.mean(column), row.spread(column))]
        runs = " ".join(map(str, row.runs))
        writer.writerow([*row.fixed(), *numbers, row.note, runs, row.protocol])
    return buffer.getvalue()

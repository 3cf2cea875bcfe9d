"""What was measured, as text: a table for each machine, no ratio without its instruction set."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from tinydm.benchmark.harness import CONTENDED, times_faster
from tinydm.benchmark.machine import label
from tinydm.benchmark.variants import BASE, OURS, title
from tinydm.report.table import lines_of

NOTHING = "–"
# of the widths of the first, further lines: what by what
PAIRS = [(base, key) for base in ("simulated", "published") for key in ("integer", "compiled")]


@dataclass
class Row:
    """One network at one batch on one machine: `seconds` of a call by variant and clean round, and
    why a variant was not measured. `steps` > 0: of a whole sampling run of so many steps. `bytes`
    are those of its files. Of `rounds` rounds `clean` were, where the machine was `watched`."""

    network: str
    batch: int
    steps: int
    machine: dict[str, Any]
    bytes: dict[str, int]
    rounds: int
    clean: int
    watched: bool
    seconds: dict[str, list[float]]
    failed: dict[str, str]

    @property
    def place(self) -> tuple:
        """What rows of the same are measurements of the same."""
        return label(self.machine), self.network, self.batch, self.steps

    @property
    def name(self) -> str:
        return f"{self.network} b{self.batch}"

    @property
    def keys(self) -> list[str]:
        return [*self.seconds, *self.failed]

    def ratio(self, key: str, base: str = BASE) -> float | None:
        """How many times faster a variant is than another; None where one was not measured."""
        return times_faster(self.seconds.get(base, []), self.seconds.get(key, []))

    def median(self, key: str) -> float | None:
        """Seconds of a call; None where it was not measured."""
        return statistics.median(self.seconds.get(key) or [0]) or None


def told(row: Row) -> str:
    """One row as text: a line for each variant."""
    lines = [f"{row.name}{run_of(row.steps)}; {conditions([row])}; {rounds_of(row)}"]
    if not row.clean:
        lines.append("  other processes kept the machine busy: no round counts; measure again")
    for key, values in row.seconds.items():
        if values:
            ratio = row.ratio(key)
            times = f"{ratio:6.2f}x" if ratio else NOTHING
            lines.append(f"  {title(key):34} {duration(row.median(key)):>9}  {times}")
    lines += [f"  {title(key):34} not measured: {why}" for key, why in row.failed.items()]
    return "\n".join(lines)


def run_of(steps: int) -> str:
    return f", a run of {steps} DDIM steps" if steps else ""


def duration(seconds: float) -> str:
    """With three digits: 4.25 ms, 1.70 s."""
    number, unit = (seconds, "s") if seconds >= 1 else (1e3 * seconds, "ms")
    return f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f} {unit}"


def megabytes(size: int) -> str:
    """1e6 bytes; a decimal below 100."""
    return f"{size / 1e6:.{1 if size < 1e8 else 0}f}"


def rounds_of(row: Row) -> str:
    return f"{row.clean} of {row.rounds} rounds clean" if row.watched else f"{row.rounds} rounds"


def conditions(rows: Sequence[Row]) -> str:
    """The machine of some rows, versions and dates."""
    torch, dates = (sorted({row.machine[key] for row in rows}) for key in ("torch", "date"))
    return f"{label(rows[0].machine)}, torch {' and '.join(torch)}, {' and '.join(dates)}"


def markdown(rows: Sequence[Row]) -> str:
    """All of it as a block for a page: speed and sampling of each machine, then sizes."""
    lines = []
    for machine in dict.fromkeys(row.place[0] for row in rows):
        for steps in sorted({row.steps for row in rows if row.place[0] == machine}):
            own = [row for row in rows if row.place[0] == machine and row.steps == steps]
            lines += speed(own, rows)
    return "\n".join([*lines, *sizes(rows), ""])


def speed(rows: Sequence[Row], others: Iterable[Row] = ()) -> list[str]:
    """Rows of one machine and one number of steps as a table, a column each, and below it what was
    not measured. `others` hold the forward passes that sampling runs are compared with."""
    what = f"Whole runs of {rows[0].steps} DDIM steps" if rows[0].steps else "One forward pass"
    forward = {row.place[:3]: row for row in others if not row.steps}
    keys = [key for key in dict.fromkeys(key for row in rows for key in row.keys) if key != BASE]
    body = [[f"{title(BASE)}, time", *map(_base_cell, rows)]]
    for key in keys:
        cells = [_cell(row, key, forward.get(row.place[:3])) for row in rows]
        if any(cell != NOTHING for cell in cells):
            body.append([title(key), *cells])
    if not rows[0].steps:
        body += _pair_lines(rows, keys)
    body.append(["clean rounds", *(_rounds_cell(row) for row in rows)])
    kept = "; in parentheses the share of the forward pass's gain that is left" * bool(
        rows[0].steps
    )
    return [
        f"**{what}: {conditions(rows)}.** Times faster than {title(BASE)}{kept}. {_watched(rows)}",
        "",
        *lines_of(["", *(row.name for row in rows)], body),
        "",
        *not_measured(rows),
    ]


def _base_cell(row):
    seconds = row.median(BASE)
    return NOTHING if seconds is None else duration(seconds)


def _cell(row, key, forward):
    ratio = row.ratio(key)
    if ratio is None:
        return NOTHING
    whole = forward.ratio(key) if row.steps and forward else None
    return f"{ratio:.2f}" + (f" ({ratio / whole:.0%})" if whole else "")


def _pair_lines(rows, keys):
    """Variants by each other: ours by the simulated ones of the same widths, our first widths by
    the others."""
    widths = list(dict.fromkeys(key.split(" ")[1] for key in keys if key.split(" ")[0] in OURS))
    pairs = [(f"{base} {bits}", f"{key} {bits}") for bits in widths[:1] for base, key in PAIRS]
    pairs += [(f"{one} {bits}", f"{one} {widths[0]}") for bits in widths[1:] for one in OURS[1:]]
    lines = []
    for base, key in pairs:
        ratios = [row.ratio(key, base) for row in rows]
        if any(ratios):
            cells = [f"{ratio:.2f}" if ratio else NOTHING for ratio in ratios]
            lines.append([f"{title(key)} against {title(base)}", *cells])
    return lines


def _rounds_cell(row):
    return f"{row.clean} of {row.rounds}" if row.watched else str(row.rounds)


def _watched(rows):
    if all(row.watched for row in rows):
        return f"Rounds with more than {CONTENDED:.0%} of the machine in other hands are dropped."
    return "No round was dropped: what other processes took was not seen."


def not_measured(rows: Sequence[Row]) -> list[str]:
    """A line for every reason: the variants that it kept from being measured, and where."""
    places: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for key, why in row.failed.items():
            places.setdefault((title(key), why), []).append(row.name)
    names: dict[tuple[str, str], list[str]] = {}
    for (name, why), there in places.items():
        where = "" if len(there) == len(rows) else f" ({', '.join(there)})"
        names.setdefault((where, why), []).append(name)
    lines = [
        f"- Not measured{where}: {'; '.join(kept)}: {why.removesuffix('.')}."
        for (where, why), kept in names.items()
    ]
    return [*lines, ""] if lines else []


def sizes(rows: Sequence[Row]) -> list[str]:
    """Sizes of the files of each network, and how many times smaller they are."""
    networks, body = {row.network: row.bytes for row in rows}, []
    for name, found in networks.items():
        whole, *small = found.values()
        cells = [f"{megabytes(size)} ({whole / size:.2f}x)" for size in small]
        body.append([name, megabytes(whole), *cells])
    head = ["", *next(iter(networks.values()))]
    return [
        "**File, MB** (1e6 bytes, and how many times smaller): first and last layer at 8 bits.",
        "",
        *lines_of(head, body),
    ]

"""Two pictures of what was measured: how small files become, and how fast networks run on each
machine."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from tinydm.benchmark.machine import label
from tinydm.benchmark.report import Row, megabytes
from tinydm.benchmark.variants import BASE, title
from tinydm.report.figures import FLOAT_COLOUR, LINE_COLOURS, QUANTIZED_COLOUR
from tinydm.report.plots import save_png

SIZE_COLOURS = {"fp32": FLOAT_COLOUR, "W8": LINE_COLOURS[1], "W4": QUANTIZED_COLOUR}
# a dot for each of these words at the first widths there are; lighter ones are not ours
MARKS = {
    "bf16": ("s", FLOAT_COLOUR),
    "fp16": ("s", LINE_COLOURS[5]),
    "onnxruntime": ("^", LINE_COLOURS[3]),
    "openvino": ("^", LINE_COLOURS[4]),
    "published": ("v", LINE_COLOURS[1]),
    "simulated": ("o", LINE_COLOURS[2]),
    "integer": ("o", "#e0a08a"),
    "compiled": ("o", QUANTIZED_COLOUR),
}
TICKS = 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16


def draw_sizes(rows: Sequence[Row], path: Path | str) -> None:
    """Draws the size of each network's file at every width of weights, logarithmic, and how many
    times smaller it is."""
    networks = {row.network: row.bytes for row in rows}
    figure = Figure(figsize=(7, 1.2 + 0.75 * len(networks)), layout="constrained")
    axes = figure.subplots()
    for place, sizes in enumerate(networks.values()):
        for i, (word, size) in enumerate(sizes.items()):
            y, label = place + 0.26 * (i - 1), word if place == 0 else None
            axes.barh(y, size / 1e6, 0.24, color=SIZE_COLOURS[word], label=label)
            smaller = "" if word == "fp32" else f", {sizes['fp32'] / size:.1f}x smaller"
            axes.annotate(
                f"{megabytes(size)} MB{smaller}",
                (size / 1e6, y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    sizes = [size / 1e6 for found in networks.values() for size in found.values()]
    axes.set(xscale="log", xlabel="size of the file, MB (log scale)")
    axes.set(xlim=(min(sizes) / 3, max(sizes) * 6), ylim=(len(networks) - 0.5, -0.5))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(networks)), networks)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=3, frameon=False)
    save_png(figure, path)


def draw_speed(rows: Sequence[Row], path: Path | str) -> None:
    """Draws how many times faster than full precision forward passes are, logarithmic: a panel for
    each machine, a line for each network and batch."""
    machines: dict[str, list[Row]] = {}
    for row in rows:
        if not row.steps and row.clean:
            machines.setdefault(label(row.machine), []).append(row)
    if not machines:
        return
    height = 2.5 + 0.32 * max(map(len, machines.values()))
    figure = Figure(figsize=(2 + 4.6 * len(machines), height), layout="constrained")
    shown, ratios = {}, [1.0]
    panels = figure.subplots(1, len(machines), squeeze=False, sharex=True)[0]
    for axes, (machine, own) in zip(panels, machines.items()):
        for place, row in enumerate(own):
            for key, (marker, colour) in marks_of(row).items():
                ratios.append(row.ratio(key))
                dots = axes.plot(ratios[-1], place, marker, color=colour, markersize=7, alpha=0.9)
                shown.setdefault(title(key), dots[0])
        axes.axvline(1, color="grey", linewidth=1)
        axes.set_yticks(range(len(own)), [row.name for row in own])
        axes.set(xscale="log", ylim=(len(own) - 0.5, -0.5))
        axes.set_xlabel(f"times faster than {title(BASE)} (log scale)")
        axes.set_title(fill(machine, 48), fontsize=9)
        axes.grid(alpha=0.3)
    low, high = min(ratios) / 1.15, max(ratios) * 1.15
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS if low <= tick <= high]
    for axes in panels:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=2, frameon=False)
    save_png(figure, path)


def marks_of(row: Row) -> dict[str, tuple[str, str]]:
    """Marker and colour of the variants of a row that the chart shows: of each word the quantized
    one, at the first widths that there are."""
    found: dict[str, str] = {}
    for key, seconds in row.seconds.items():
        word, _, bits = key.partition(" ")
        if seconds and word in MARKS and (word not in found or bits and " " not in found[word]):
            found[word] = key
    return {found[word]: MARKS[word] for word in MARKS if word in found}

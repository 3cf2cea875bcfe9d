"""Pictures inside the page, as data URIs: the same bytes every time."""

import base64
import io
import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from PIL import Image

from models.data import read_image

FLOAT_COLOUR, QUANTIZED_COLOUR = "#9aa5b1", "#b4441c"
LINE_COLOURS = ("#b4441c", "#1f5f8b", "#3c7a3a", "#7a4b94", "#8a6d1b", "#4d5763")
# a dollar in a name is no formula; ids inside an SVG do not change
STYLE = {"text.parse_math": False, "svg.hashsalt": "tinydm"}


def data_uri(content: bytes, kind: str) -> str:
    """An image of the kind "png" or "svg+xml" as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def svg_uri(figure: Figure) -> str:
    """A figure as the data URI of an SVG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return data_uri(buffer.getvalue(), "svg+xml")


@matplotlib.rc_context(STYLE)
def draw_sqnr(runs: list[dict[str, Any]]) -> str:
    """SQNR of the predicted noise by sampling step, a line a run; "" where none has numbers."""
    lines = [(run["name"], run["curve"]) for run in runs if run["curve"]]
    if not lines:
        return ""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(lines):
        axes.plot(*zip(*points), marker=".", color=LINE_COLOURS[i % len(LINE_COLOURS)], label=name)
    axes.set(xlabel="sampling step (0 = pure noise)", ylabel="SQNR of the predicted noise, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return svg_uri(figure)


@matplotlib.rc_context(STYLE)
def draw_block_errors(passes: list[dict[str, Any]] | None) -> str:
    """Error of every block before and after reconstruction, a panel a phase; "" for no errors."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in passes or []:
        if (row.get("error_before") or 0) > 0 and (row.get("error_after") or 0) > 0:
            groups.setdefault(row.get("phase") or row["pass"], []).append(row)
    if not groups:
        return ""
    height = 0.8 + 0.26 * max(map(len, groups.values()))
    figure = Figure(figsize=(10, height), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False)[0]
    for axes, (title, rows) in zip(panels, groups.items()):
        _draw_bars(axes, rows)
        axes.set_title(title, fontsize=10)
    bars = axes.get_legend_handles_labels()
    figure.legend(*bars, loc="outside right upper", frameon=False, fontsize=8)
    return svg_uri(figure)


def _draw_bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    pairs = (-0.2, "error_before", FLOAT_COLOUR), (0.2, "error_after", QUANTIZED_COLOUR)
    for offset, key, colour in pairs:
        places = [place + offset for place in range(len(rows))]
        values, label = [row[key] for row in rows], key.removeprefix("error_")
        axes.barh(places, values, 0.4, color=colour, label=label)
    names = [row.get("unit") or ", ".join(row.get("layers", [])) for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    logs = [math.log10(row[key]) for row in rows for _, key, _ in pairs]
    axes.set(
        xscale="log",
        xlabel="error of the block's output",
        xlim=(10.0 ** math.floor(min(logs) - 0.1), 10.0 ** math.ceil(max(logs))),
        ylim=(len(rows) - 0.4, -0.6),
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, axis="x")


def draw_grids(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Images of a run beside those of full precision with the same names, as far as there are."""
    if not run["samples"]:
        return []
    names = run["common"] or run["samples"]
    grids = [draw_grid(run["path"] / "samples", names, "quantized")]
    if run["common"]:
        grids.insert(0, draw_grid(run["float_path"], names, "full precision, same seeds"))
    return grids


def draw_grid(folder: Path, names: list[str], caption: str) -> dict[str, Any]:
    """The first images as one PNG -> {src, width, height, count, first, last, caption}: 8 x 8 at
    twice their size if they are small, else 4 x 4 of at most 128 pixels."""
    width = read_image(folder / names[0]).shape[2]
    columns, side = 8 if width <= 64 else 4, min(width, 128)
    names, step = names[: columns**2], side + 1
    rows = -(-len(names) // columns)
    sheet = Image.new("RGB", (columns * step - 1, rows * step - 1), "white")
    for i, name in enumerate(names):
        image = Image.fromarray(read_image(folder / name).permute(1, 2, 0).numpy())
        image = image if image.width == side else image.resize((side, side), Image.LANCZOS)
        sheet.paste(image, (i % columns * step, i // columns * step))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    zoom = 2 if side <= 32 else 1
    return {
        "src": data_uri(buffer.getvalue(), "png"),
        "width": sheet.width * zoom,
        "height": sheet.height * zoom,
        "count": len(names),
        "first": names[0].removesuffix(".png"),
        "last": names[-1].removesuffix(".png"),
        "caption": caption,
    }

"""Pictures as PNG files: ranges over channels and time and errors over layers and time, as
quant/analysis.py measures them, and the scores of a comparison. Axes: S steps, C channels."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from base.files import write_atomically

RANGE = "max |x| over images and positions"
SMALLEST = 1e-8  # below it a range has no place on a logarithmic scale
DOT_COLOUR = "#b4441c"  # that of quantized networks in the report
ERRORS = {
    "mse": "MSE of the layer's output (log scale)",
    "mae": "MAE (log scale)",
    "sqnr_db": "SQNR, dB",
}
LOG_FROM = 30  # ratio of scores
# rows or columns of a picture; more share one, by their maximum
MOST = 256


def save_png(figure: Figure, path: Path | str) -> None:
    """Write a figure as a PNG file, whole or not at all."""
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=150))


def label_steps(axis: Axis, t: Sequence[float]) -> None:
    """Label an axis that counts steps 0 .. S-1 by network times t (S,), at most nine ticks."""
    shown = sorted({round(i) for i in np.linspace(0, len(t) - 1, 9)})
    axis.set_ticks(shown, [f"{t[i]:g}" for i in shown])


def pooled(r_abs: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pool r_abs (S, C) -> at most MOST x MOST values, each the maximum of its neighbours so that
    what sticks out stays, and the first step and channel of each row and column."""
    r = np.asarray(r_abs)
    steps, channels = (np.arange(0, num, -(-num // MOST)) for num in r.shape)
    by_step = np.maximum.reduceat(r, steps, axis=0)
    return np.maximum.reduceat(by_step, channels, axis=1), steps, channels


def range_map(path: Path | str, r_abs: ArrayLike, t: Sequence[float], title: str) -> None:
    """Draw a heat map of r_abs (S, C) at network times t (S,), logarithmic, noisiest on top."""
    r, steps, channels = pooled(r_abs)
    r = np.maximum(r, SMALLEST)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    num_steps, num_channels = np.shape(r_abs)
    edges = np.append(channels, num_channels) - 0.5, np.append(steps, num_steps) - 0.5
    picture = axes.pcolormesh(*edges, r, cmap="viridis", norm=LogNorm(r.min(), r.max()))
    axes.invert_yaxis()
    axes.set(xlabel="channel", ylabel="network timestep t", title=title)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    label_steps(axes.yaxis, t)
    bar = figure.colorbar(picture, label=f"{RANGE} (log scale)")
    ticks = np.geomspace(r.min(), r.max(), 5)
    bar.set_ticks(ticks, labels=[f"{value:.3g}" for value in ticks])
    bar.minorticks_off()
    save_png(figure, path)


def range_surface(path: Path | str, r_abs: ArrayLike, t: Sequence[float], title: str) -> None:
    """Draw r_abs (S, C) over channel and time t (S,). Raises ValueError for one row or column."""
    if min(np.shape(r_abs)) < 2:
        raise ValueError(
            f"a surface needs two steps and two channels, found {tuple(np.shape(r_abs))}; draw "
            "the map"
        )
    r, steps, channels = pooled(r_abs)
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot(projection="3d")
    # Every value gets its face: by default single channels, the very ones that stick out, would be
    # skipped.
    faces = {"rcount": len(steps), "ccount": len(channels)}
    axes.plot_surface(channels[None], steps[:, None], r, **faces, cmap="viridis", linewidth=0)
    axes.set(xlabel="channel", zlabel=RANGE)
    axes.set_ylabel("network timestep t", labelpad=10)
    axes.set_title(title, y=1)
    axes.set_box_aspect((4, 4, 2.6), zoom=1.05)
    label_steps(axes.yaxis, t)
    save_png(figure, path)


def error_map(path: Path | str, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw heat maps of MSE, MAE and SQNR of every layer (down) at every step (across) from rows of
    `quant.analysis.layer_errors`, bright where the error is large, grey where there is none."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    t = [row["t"] for row in rows if row["layer"] == layers[0]]
    figure = Figure(figsize=(13, max(3, 2.2 + 0.15 * len(layers))), layout="constrained")
    figure.suptitle(title)
    for axes, (key, label) in zip(figure.subplots(1, len(ERRORS), sharey=True), ERRORS.items()):
        values = [row[key] if row["mse"] else np.nan for row in rows]
        error = np.array(values).reshape(len(layers), len(t))
        found, log = np.isfinite(error).any(), key != "sqnr_db"
        axes.set_facecolor("lightgrey")
        colours = {"cmap": "viridis" if log else "viridis_r"}
        colours["norm"] = LogNorm() if found and log else None
        picture = axes.imshow(error, aspect="auto", interpolation="nearest", **colours)
        axes.set(xlabel="network timestep t")
        axes.set_yticks(range(len(layers)), layers, fontsize=7)
        label_steps(axes.xaxis, t)
        if found:
            figure.colorbar(picture, label=label, location="bottom", pad=0.01, aspect=30)
    save_png(figure, path)


def score_chart(
    path: Path | str,
    labels: Sequence[str],
    panels: Mapping[str, Sequence[tuple[Sequence[float], float | None]]],
) -> None:
    """Draw a row for each of `labels` and a panel for each of `panels`: {name: [(numbers of the
    seeds, that of full precision or None) for each row]}. Shows mean and sample deviation, and a
    grey line for full precision, logarithmic where numbers differ by more than LOG_FROM times."""
    size = 1 + 0.09 * max(map(len, labels)) + 4 * len(panels), 1.5 + 0.28 * len(labels)
    figure, marks = Figure(figsize=size, layout="constrained"), {}
    dot = {"fmt": "o", "capsize": 3, "color": DOT_COLOUR}
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (name, rows) in zip(columns, panels.items()):
        for place, (values, full) in enumerate(rows):
            if values:
                spread = statistics.stdev(values) if len(values) > 1 else None
                drawn = axes.errorbar(statistics.mean(values), place, xerr=spread, **dot)
                marks["mean ± sample deviation over seeds"] = drawn
            if full is not None:
                marks["full precision"] = axes.vlines(full, place - 0.5, place + 0.5, color="grey")
        shown = [number for values, _ in rows for number in values]
        scale = "log" if shown and 0 < LOG_FROM * min(shown) < max(shown) else "linear"
        axes.set(xlabel=name, ylim=(len(labels) - 0.5, -0.5), xscale=scale)
        if scale == "linear":
            axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_yticks(range(len(labels)), labels)
        axes.grid(axis="x", alpha=0.3)
    figure.legend(marks.values(), marks.keys(), loc="outside upper right", ncols=2, frameon=False)
    save_png(figure, path)

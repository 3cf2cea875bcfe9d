"""The picture of how calibration grows, and how straight its lines are."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tinydm.report.figures import LINE_COLOURS
from tinydm.report.plots import save_png

TOTAL = "all"


@dataclass
class Walk:
    """Reconstruction of a whole network at `samples` samples: CPU seconds since it began as each of
    `units` ended, multiply-adds of each for one sample, and CPU seconds by part, where it said
    so."""

    samples: int
    units: list[str]
    seconds: list[float]
    macs: list[int]
    parts: dict[str, float]

    @property
    def gigamacs(self) -> list[float]:
        """Multiply-adds up to each unit, 1e9."""
        return [count / 1e9 for count in accumulate(self.macs)]


def line_through(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope and offset of the straight line of least squares, and R², the share of the variance of
    y that it explains."""
    slope, offset = np.polyfit(x, y, 1)
    left = np.square(np.asarray(y) - (slope * np.asarray(x) + offset)).sum()
    whole = np.square(np.asarray(y) - np.mean(y)).sum()
    return float(slope), float(offset), float(1 - left / whole) if whole else 1.0


def straightness(walks: Sequence[Walk]) -> str:
    """How straight the lines are, in words."""
    largest = max(walks, key=lambda walk: walk.samples)
    over = {"multiply-adds": largest.gigamacs, "units": range(1, len(largest.units) + 1)}
    told = [f"over {name} R² {line_through(x, largest.seconds)[2]:.3f}" for name, x in over.items()]
    slope, offset, r2 = line_through(*over_samples(walks)[TOTAL])
    return (
        f"{', '.join(told)} at {largest.samples} samples; over samples R² {r2:.3f}: {offset:.1f} s "
        f"+ {slope:.2f} s a sample"
    )


def over_samples(walks: Sequence[Walk]) -> dict[str, tuple[list[int], list[float]]]:
    """Samples and CPU seconds of all of it and, where every walk says so, of each part."""
    walks = sorted(walks, key=lambda walk: walk.samples)
    samples = [walk.samples for walk in walks]
    lines = {TOTAL: (samples, [walk.seconds[-1] for walk in walks])}
    for part in walks[0].parts:
        if all(part in walk.parts for walk in walks):
            lines[part] = samples, [walk.parts[part] for walk in walks]
    return lines


def draw_growth(walks: Sequence[Walk], title: str, path: Path | str) -> None:
    """Draws CPU seconds over units, over their multiply-adds and over samples; dashed lines are
    those of least squares."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=10)
    units, macs, samples = figure.subplots(1, 3)
    for walk, colour in zip(walks, cycle(LINE_COLOURS)):
        count, named = range(1, len(walk.units) + 1), {"label": f"{walk.samples} samples"}
        units.plot(count, walk.seconds, ".-", color=colour, **named)
        macs.plot(walk.gigamacs, walk.seconds, ".", color=colour, **named)
        _dashed(macs, walk.gigamacs, walk.seconds, colour)
    for (part, (x, y)), colour in zip(over_samples(walks).items(), cycle(LINE_COLOURS)):
        samples.plot(x, y, "o", color=colour, label=part)
        _dashed(samples, x, y, colour)
    units.set(xlabel="units done", ylabel="CPU seconds since the first began")
    units.xaxis.set_major_locator(MaxNLocator(integer=True))
    macs.set(xlabel="multiply-adds of these for one sample, 1e9")
    samples.set(xlabel="calibration samples", ylabel="CPU seconds of all units")
    for axes in (units, macs, samples):
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    save_png(figure, path)


def _dashed(axes: Axes, x: Sequence[float], y: Sequence[float], colour: str) -> None:
    slope, offset, _ = line_through(x, y)
    ends = np.array([0, max(x)])
    axes.plot(ends, slope * ends + offset, "--", color=colour, linewidth=1)

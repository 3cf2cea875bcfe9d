"""Measure ranges and errors of the model of a run folder along its full-precision trajectories:

    python scripts/analyze.py RUN [points=GLOB] [evaluation.sqnr_images=64] [force=true]

Writes RUN/ranges.safetensors (minimum, maximum, mean and deviation of every quantization point by
step and channel), RUN/ranges.json (what follows for each point: variation over time, imbalance of
channels, whether the two separate) and, if the run is quantized, RUN/layer_errors.csv (MSE, MAE and
SQNR of every layer at every step). Prints the points whose name matches `points`, the least
balanced first, draws the first and the errors into RUN/figures/. Nothing is measured twice."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from base.config import one_folder, take_words
from base.files import load_tensors, save_tensors, sha256, write_text
from base.network import batch_of
from models.sampling import trajectory
from quant.analysis import Ranges, decide, describe, layer_errors, observe_ranges
from tinydm.report.plots import error_map, range_map, range_surface
from tinydm.run_folder import Run, open_run
from tinydm.stages.quantize import with_quantized

NUM_DRAWN = 8  # points with pictures of their own


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    folder, words = one_folder(arguments)
    choice, words = take_words(words, {"points": "*"})
    print(analyze(open_run(folder, words), **choice))


def analyze(run: Run, points: str = "*") -> str:
    """Measures what is not measured yet, draws the points that match; returns ranges as text."""
    path, quantized, lines = run.path("ranges.json"), run.path("quantized.safetensors"), []
    sampling = {key: value for key, value in asdict(run.config.sampling).items() if key != "num"}
    asked = {
        "model": run.config.name,
        "weights_hash": run.model.weights_hash,
        "sampling": sampling,
        "images": run.config.evaluation.sqnr_images,
        "device": str(run.model.device),
        "quantized": sha256(quantized) if quantized.exists() else None,
    }
    if path.exists() and not run.config.force and json.loads(path.read_text())["asked"] == asked:
        lines.append(f"analyze: measured already, {path}")
    else:
        with run.stage("analyze"):
            measured = measure(run)
            write_text(path, json.dumps({"asked": asked, "points": measured}, indent=1))
    lines.append(draw_ranges(run, points))
    if quantized.exists():
        lines.append(draw_errors(run))
    else:
        lines.append(
            f"analyze: errors of layers are left out, {quantized} does not exist yet; make it "
            f"with: python scripts/quantize.py {run.folder}, then run this again"
        )
    return "\n".join([*lines, f"analyze: {path}, {run.path('figures')}"])


def measure(run: Run) -> dict[str, dict[str, Any]]:
    """Writes ranges and errors of layers; returns what the ranges say of each point."""
    steps = record(run)
    t = {step: t for step, t, _, _ in steps}
    ranges = observe_ranges(run.model.net, network_calls(run, steps, "ranges"))
    tensors = {}
    for point, found in ranges.items():
        tensors |= {f"{point}.{kind}": value for kind, value in vars(found).items()}
    save_tensors(run.path("ranges.safetensors"), tensors, {"t": [t[step] for step in sorted(t)]})
    path = run.path("quantized.safetensors")
    if path.exists():
        quantized = with_quantized(run.model, path)
        calls = network_calls(run, steps, "errors of layers")
        rows = layer_errors(run.model.net, quantized.net, calls)
        write_csv(run.path("layer_errors.csv"), rows)
    return {point: judge(found.r_abs) for point, found in ranges.items()}


def judge(r_abs: torch.Tensor) -> dict[str, Any]:
    """What the ranges (steps, channels) of a point say: numbers (None if it is dead), advice."""
    numbers = describe(r_abs)
    finite = {key: None if math.isnan(value) else value for key, value in numbers.items()}
    return {"channels": r_abs.shape[1]} | finite | decide(numbers)


def record(run: Run) -> list[tuple]:
    """Samples `evaluation.sqnr_images` images in full precision; returns (step, t, x, cond) of
    every evaluation, batch after batch. x is kept on the CPU, the condition once per batch."""
    s, num = run.config.sampling, run.config.evaluation.sqnr_images
    seen, total = trajectory(run.model, s, num, s.seed), -(-num // s.batch_size)
    bar = {"unit": "step", "total": total * run.num_evaluations}
    seen = tqdm(seen, "analyze: full-precision trajectories", **bar)
    return [(step, t, x.cpu(), cond) for step, t, x, cond, _ in seen]


def network_calls(run: Run, steps: list[tuple], what: str) -> Iterator[tuple]:
    """Yields what was recorded as (step, arguments of the network), guidance included."""
    for step, t, x, cond in tqdm(steps, desc=f"analyze: {what}", unit="step"):
        x = x.to(run.model.device)
        yield step, run.model.network_inputs(x, batch_of(t, x), cond)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows under the names of the first one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def draw_ranges(run: Run, pattern: str) -> str:
    """Draws the points whose names match, and returns them as text, by falling imbalance of
    channels.

    Pictures are made of the first NUM_DRAWN points that have several channels and do not read what
    another one reads. Raises ValueError where no name matches."""
    path = run.path("ranges.json")
    points = json.loads(path.read_text())["points"]
    names = [name for name in points if fnmatchcase(name, pattern)]
    if not names:
        remedy = f"{path} has their names, for example {', '.join(list(points)[:3])}"
        raise ValueError(f"no quantization point matches points={pattern}; {remedy}")
    names.sort(key=lambda name: -(points[name]["channel_imbalance"] or 0))
    tensors, meta = load_tensors(run.path("ranges.safetensors"))
    drawn = []
    for name in names:
        r_abs = Ranges(*(tensors[f"{name}.{kind.name}"] for kind in fields(Ranges))).r_abs
        if min(r_abs.shape) == 1 or any(torch.equal(r_abs, other) for other in drawn):
            continue
        title = f"{run.config.name}, input of {name}"
        range_map(run.path(f"figures/{name}-map.png"), r_abs, meta["t"], title)
        range_surface(run.path(f"figures/{name}-surface.png"), r_abs, meta["t"], title)
        drawn.append(r_abs)
        if len(drawn) == NUM_DRAWN:
            break
    return format_points({name: points[name] for name in names})


def draw_errors(run: Run) -> str:
    """Draws the errors of layers; returns the worst one as a sentence."""
    with open(run.path("layer_errors.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {key: float(value) for key, value in row.items() if key != "layer"}
    c, bits = run.config, run.config.bits
    title = f"{c.name}, {c.method} W{bits.weight}A{bits.input}: error of each layer by itself"
    error_map(run.path("figures/layer_errors.png"), rows, title)
    worst = min(rows, key=lambda row: row["sqnr_db"])
    place = f"{worst['layer']} at t = {worst['t']:g}"
    return f"lowest SQNR of a layer by itself: {worst['sqnr_db']:.2f} dB, {place}"


def format_points(points: dict[str, dict[str, Any]]) -> str:
    """Returns a table of what the ranges of points say."""
    head = "quantization point"
    width = max(map(len, (head, *points)))
    lines = [f"{head:{width}} {'channels':>8} {'V_t':>8} {'V_c':>8} {'rho':>8}  asks for"]
    for name, found in points.items():
        values = [found[key] for key in ("temporal_variation", "channel_imbalance", "rho")]
        numbers = " ".join(f"{'-':>8}" if v is None else f"{v:>8.3f}" for v in values)
        wanted = ", ".join(key for key in ("segments", "balance", "by_range") if found[key])
        lines.append(f"{name:{width}} {found['channels']:>8} {numbers}  {wanted}".rstrip())
    return "\n".join(lines)

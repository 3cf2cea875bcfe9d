"""Measure ranges and errors of the model of a run folder along its full-precision trajectories:

    python scripts/analyze.py RUN [points=GLOB] [evaluation.sqnr_images=64] [force=true]

Writes RUN/ranges.safetensors (minimum, maximum, mean and deviation of every quantization point by
step and channel), RUN/ranges.json (what follows for each point: variation over time, imbalance of
channels, whether the two separate) and, if the run is quantized, RUN/layer_errors.csv (MSE, MAE and
SQNR of every layer at every step). Prints the points whose name matches `points`, the least
balanced first, and draws the first of them and the errors into RUN/figures/; with what is measured
already, that is all it does."""

import csv
import hashlib
import io
import json
import math
from dataclasses import asdict, fields
from fnmatch import fnmatchcase

import torch
from tqdm import tqdm

from base.config import one_folder
from base.files import load_tensors, save_tensors, write_text
from base.network import batch_of
from models.zoo import build_network
from quant.analysis import Ranges, decide, describe, layer_errors, observe_ranges
from quant.checkpoint import load_quantized
from tinydm.report.plots import error_map, range_map, range_surface
from tinydm.run_folder import open_run
from tinydm.stages.quantize import trajectory

NUM_DRAWN = 8  # points with pictures of their own


def run(arguments):
    folder, words = one_folder(arguments)
    points = [word.removeprefix("points=") for word in words if word.startswith("points=")]
    analyze(
        open_run(folder, [word for word in words if not word.startswith("points=")]), *points[-1:]
    )


def analyze(run, points="*"):
    path, quantized = run.path("ranges.json"), run.path("quantized.safetensors")
    sampling = {key: value for key, value in asdict(run.config.sampling).items() if key != "num"}
    asked = {
        "model": run.config.name,
        "weights_hash": run.model.weights_hash,
        "sampling": sampling,
        "images": run.config.evaluation.sqnr_images,
        "device": str(run.model.device),
        "quantized": hashlib.sha256(quantized.read_bytes()).hexdigest()
        if quantized.exists()
        else None,
    }
    if path.exists() and not run.config.force and json.loads(path.read_text())["asked"] == asked:
        print(f"analyze: measured already, {path}")
    else:
        with run.stage("analyze"):
            facts = measure(run)
            write_text(path, json.dumps({"asked": asked, "points": facts}, indent=1))
    show_ranges(run, points)
    if quantized.exists():
        show_errors(run)
    else:
        print(
            f"analyze: errors of layers are left out, {quantized} does not exist yet; make it "
            "with: python "
            f"scripts/quantize.py {run.folder}, then run this again"
        )
    print(f"analyze: {path}, {run.path('figures')}")


def measure(run):
    """Write ranges and errors of layers; returns the facts of each point."""
    record = recorded(run)
    t = {step: t for step, t, _, _ in record}
    ranges = observe_ranges(run.model.net, batches(run, record, "ranges"))
    tensors = {
        f"{point}.{kind}": value
        for point, found in ranges.items()
        for kind, value in vars(found).items()
    }
    save_tensors(run.path("ranges.safetensors"), tensors, {"t": [t[step] for step in sorted(t)]})
    if run.path("quantized.safetensors").exists():
        net = load_quantized(
            run.path("quantized.safetensors"), build_network, expected=run.model.weights_hash
        )
        rows = layer_errors(
            run.model.net, net.to(run.model.device), batches(run, record, "errors of layers")
        )
        write_csv(run.path("layer_errors.csv"), rows)
    facts = {}
    for point, found in ranges.items():
        numbers = describe(found.r_abs)
        decisions = decide(numbers)
        # of a dead point
        numbers = {key: None if math.isnan(value) else value for key, value in numbers.items()}
        facts[point] = {"channels": found.r_abs.shape[1]} | numbers | decisions
    return facts


def recorded(run):
    """Full-precision trajectories of `evaluation.sqnr_images` images -> [(step, t, x, cond)], a
    batch of images after the other; x is kept on the CPU, the condition once per batch."""
    s, num = run.config.sampling, run.config.evaluation.sqnr_images
    seen = tqdm(
        trajectory(run, num, s.seed),
        desc="analyze: full-precision trajectories",
        unit="step",
        total=-(-num // s.batch_size) * run.num_evaluations,
    )
    return [(step, t, x.cpu(), cond) for step, t, x, cond, _ in seen]


def batches(run, record, what):
    """The record as (step, arguments of the network), guidance included."""
    for step, t, x, cond in tqdm(record, desc=f"analyze: {what}", unit="step"):
        x = x.to(run.model.device)
        yield step, run.model.network_inputs(x, batch_of(t, x), cond)


def write_csv(path, rows):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def show_ranges(run, pattern):
    """Print and draw the points whose names match, by falling imbalance of channels."""
    facts = json.loads(run.path("ranges.json").read_text())["points"]
    names = [name for name in facts if fnmatchcase(name, pattern)]
    if not names:
        raise ValueError(
            f"no quantization point matches points={pattern}; {run.path('ranges.json')} has their "
            "names, "
            f"for example {', '.join(list(facts)[:3])}"
        )
    names.sort(key=lambda name: -(facts[name]["channel_imbalance"] or 0))
    print(format_points({name: facts[name] for name in names}))
    draw_ranges(run, names)


def draw_ranges(run, names):
    """Pictures of the first NUM_DRAWN points that have several channels and do not read what
    another one reads."""
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
            return


def show_errors(run):
    with open(run.path("layer_errors.csv"), newline="") as file:
        rows = [
            {key: value if key == "layer" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    bits = run.config.bits
    error_map(
        run.path("figures/layer_errors.png"),
        rows,
        f"{run.config.name}, {run.config.method} W{bits.weight}A{bits.input}: error of each layer "
        "by itself",
    )
    worst = min(rows, key=lambda row: row["sqnr_db"])
    print(
        f"lowest SQNR of a layer by itself: {worst['sqnr_db']:.2f} dB, {worst['layer']} at t = "
        f"{worst['t']:g}"
    )


def format_points(facts):
    """The facts of points as text."""
    width = max(map(len, ("quantization point", *facts)))
    lines = [
        f"{'quantization point':{width}} {'channels':>8} {'V_t':>8} {'V_c':>8} {'rho':>8}  asks for"
    ]
    for name, f in facts.items():
        numbers = " ".join(
            f"{'-':>8}" if f[key] is None else f"{f[key]:>8.3f}"
            for key in ("temporal_variation", "channel_imbalance", "rho")
        )
        wanted = ", ".join(key for key in ("segments", "balance", "by_range") if f[key])
        lines.append(f"{name:{width}} {f['channels']:>8} {numbers}  {wanted}".rstrip())
    return "\n".join(lines)

"""Quantize the model of a run folder:  python scripts/quantize.py RUN [memory_gb=8] [force=true]
What would be done, by shapes alone, without weights:

    python scripts/quantize.py configs/model/MODEL.yaml configs/bits/BITS.yaml \\
        configs/method/METHOD.yaml [configs/preset/demo.yaml] dry_run=true [key=value ...]

Reads RUN/calibration.safetensors, writes RUN/quantized.safetensors, RUN/passes.jsonl (error before
and after of each unit), RUN/map.json and RUN/map.txt (what is quantized). Started again it goes on
after the last finished unit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from base.config import load, one_folder, split_arguments
from base.devices import resolve_device
from base.files import Tensors, save_tensors, write_lines, write_text
from base.workers import agreed, first_only, is_first, wait
from models.diffusion import DiffusionModel, example_arguments, load_model
from models.sampling import differentiable, trajectory
from models.zoo import build_network
from quant.calibration.dataset import CalibrationSet
from quant.calibration.files import load_calibration
from quant.checkpoint import load_quantized, packed_bytes, read_recipe, save_quantized
from quant.convert import convert
from quant.graph import Graph, trace
from quant.inventory import format_map, quantization_map
from quant.passes.dynamic_scales import functions_of
from quant.passes.job import Job
from quant.passes.run import run_passes
from quant.reconstruction.budget import disk_budget, plan_capture
from quant.timeline import Timeline
from tinydm.arithmetic import decided
from tinydm.forecast import forecast
from tinydm.identity import recipe_of
from tinydm.recipe import RunConfig, boundaries, check, load_recipe, network_times
from tinydm.run_folder import Run, open_run, write_config

DRY_RUN = "dry_run=true"
Log = Callable[[str], Any]  # takes one line of progress
log_line = logging.getLogger("tinydm").info


def run(arguments: list[str]) -> None:
    """Runs the stage, or its dry run, by a command line."""
    if DRY_RUN in arguments:
        files, words = split_arguments([a for a in arguments if a != DRY_RUN])
        print(plan(load_recipe(files, ["out=none", *words])))
    else:
        print(quantize(open_run(*one_folder(arguments)), partial(print, flush=True)))


def plan(config: RunConfig) -> str:
    """Tells what quantizing by this recipe comes to, what it is going to take included, for which
    steps with random weights are timed; none are needed."""
    check(config)
    with torch.device("meta"):
        net = build_network(**config.network)
    quantized = convert(net, config.all_rules, Timeline(boundaries(config)))
    graph = trace(net, example_arguments(asdict(config), net))
    c, layers = config.calibration, quantization_map(net, quantized, graph.macs)
    samples = c.steps * c.images * (2 if config.guidance.scale != 1 else 1)
    floats = sum(p.numel() * p.element_size() for p in net.parameters())
    packed, disk_gb = packed_bytes(quantized), disk_budget(config.disk_gb, Path(config.out).parent)
    try:
        learned = min(samples, config.effort.num_samples or samples)
        captured = plan_capture(graph, learned, config.memory_gb, disk_gb)
        again, memory, disk = captured.passes, captured.memory, captured.disk
    except ValueError as does_not_fit:
        captured, again, memory, disk = does_not_fit, 0.0, 0, 0
    states = c.images * (len(network_times(config)) + 1) + samples  # trajectories, and those picked
    disk += 4 * states * net.in_channels * net.image_size**2 + 2 * packed
    foretold = forecast(config, net, graph, samples, again)  # the network is no longer on meta
    return (
        f"{format_map(layers)}\n{config.name}: {len(graph.units)} reconstruction units, "
        f"{sum(graph.macs.values()) / 1e9:.3f} G multiply-adds per image and run of the network\n"
        f"weights: {floats:,} bytes in FP32, {packed:,} quantized, {floats / packed:.2f} x "
        "smaller\n"
        f"calibration: {samples:,} samples; {captured}\n"
        f"{foretold}\n"
        f"memory: about {(foretold.memory + memory) / 2**30:.1f} GiB at the most; disk: about "
        f"{disk / 2**30:.2f} GiB"
    )


def quantize(run: Run, log: Log = log_line) -> str:
    """Quantizes the model of a run folder; returns what was done as a sentence."""
    path = run.path("quantized.safetensors")
    if agreed(path.exists() and not run.config.force):
        return f"quantize: done already, {path}"
    calibration = load_calibration(run.need("calibration.safetensors", "calibrate"))
    run.begin()
    note = first_only(partial(write_lines, run.path("passes.jsonl")))
    with run.stage("quantize"):
        folder = run.path("resume/quantize")
        job = prepare(run.model, run.config, calibration, folder, log=log, note=note)
        log(write_map(run, job.net, job.graph))
        run.config, tried = decided(run.config, job, log)
        run.config.provenance |= {"trial": tried} if tried else {}
        write_config(run)
        run_passes(job, run.config.all_passes)
        write_map(run, job.net, job.graph)  # passes may have changed widths
        save(run, job.net, functions_of(job.net), job.rules)
        wait()
    run.finish("quantize")
    size, floats = path.stat().st_size, run.model.float_bytes
    factor = f"{floats / size:.2f} x smaller than {floats:,} of FP32"
    return f"quantize: {path}, {size:,} bytes, {factor}"


@first_only
def save(run: Run, net: nn.Module, functions: Tensors, rules: list[dict[str, Any]]) -> None:
    """Writes a hardened network that was converted by `rules`, and the functions of time that gave
    it its scales, if any, into the run folder."""
    if functions:
        save_tensors(run.path("dynamic.safetensors"), functions, {})
    save_quantized(run.path("quantized.safetensors"), net, run.recipe(rules))


def prepare(
    model: DiffusionModel, config: RunConfig, data: CalibrationSet, folder: Path, **reports: Log
) -> Job:
    """Makes what the passes work on: the converted network and all that they may ask for. Finished
    parts are kept in `folder`. `reports`: log takes a line of progress, note all rows so far."""
    return Job(
        model=model,
        net=convert(model.net, config.all_rules, Timeline(boundaries(config))),
        calibration=data,
        graph=trace(model.net, data.arguments(slice(0, 1))),
        resume_folder=folder,
        rules=config.all_rules,
        seed=config.seed,
        max_batch=config.max_batch,
        memory_gb=config.memory_gb,
        disk_gb=config.disk_gb,
        trajectory=partial(trajectory, model, config.sampling),
        differentiable=partial(differentiable, model, config.sampling, max_batch=config.max_batch),
        **reports,
    )


def quantize_model(
    model: DiffusionModel, config: RunConfig, data: CalibrationSet, **reports: Log
) -> tuple[nn.Module, dict[str, Any]]:
    """Quantizes a model by a recipe, without a run folder; returns the hardened network and the
    recipe that quant.checkpoint.save_quantized stores with it. `reports` are those of `prepare`."""
    with TemporaryDirectory() as scratch:
        job = prepare(model, config, data, Path(scratch), **reports)
        config, _ = decided(config, job, job.log)
        run_passes(job, config.all_passes)
    return job.net, recipe_of(config, model.weights_hash, job.rules)


def load_quantized_model(
    path: Path | str, device: str = "auto", checkpoint: str = ""
) -> DiffusionModel:
    """Loads the model that a quantized file belongs to, around the quantized network. All else
    comes from the checkpoint that the file names, or from `checkpoint`. Raises ValueError where
    that has other weights than the file was made from, and for a file of an earlier version, which
    does not name one and is not in its run folder."""
    path = Path(path)
    recipe, saved = read_recipe(path)[0], path.with_name("config.yaml")
    if "checkpoint" not in recipe:
        if not saved.exists():
            raise ValueError(
                f"{path} is of an earlier version and does not say how its model is built; keep it "
                "in its run folder, or quantize again"
            )
        recipe = asdict(load(RunConfig, [saved])) | recipe
    if checkpoint:
        recipe["checkpoint"] = checkpoint
    return with_quantized(load_model(recipe, device=resolve_device(device)), path)


def with_quantized(model: DiffusionModel, path: Path) -> DiffusionModel:
    """The model around the network of a quantized file. Raises ValueError for other weights."""
    net = load_quantized(path, build_network, expected=model.weights_hash)
    return model.with_net(net.to(model.device))


def write_map(run: Run, net: nn.Module, graph: Graph | None = None) -> str:
    """Writes what is quantized into the run folder; returns it as text. `graph` is that of the
    model's network, traced here where none is given."""
    original = run.model.net
    graph = graph or trace(original, example_arguments(asdict(run.config), original))
    layers = quantization_map(original, net, graph.macs, network_times(run.config))
    if is_first():
        write_text(run.path("map.json"), json.dumps(layers, indent=1))
        write_text(run.path("map.txt"), format_map(layers) + "\n")
    return format_map(layers)

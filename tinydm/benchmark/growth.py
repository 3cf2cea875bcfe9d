"""Measure how the seconds of calibration grow with units and with samples:

    tinydm benchmark growth                                   some five minutes of one AVX2 thread
    tinydm benchmark growth network=latent-compact "samples=[8,16]"          half a minute

Q-Diffusion's reconstruction at W4A8 of a network with random weights, in float32, at several
numbers of samples, with a step or a few a unit. CPU seconds are noted as each unit ends: capture
of its inputs, learning, and measuring its errors. Steps are as many at any number of samples, and
errors are measured on 256 samples at most: with more than those, capture alone grows.

OUT/growth.json holds the seconds, OUT/calibration-growth.png shows them over the units, over their
multiply-adds and over the samples."""

import json
import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from base.config import load
from base.devices import exact_arithmetic
from base.files import write_text
from ddim.schedule import make_schedule
from models.diffusion import DiffusionModel
from quant.calibration.dataset import CalibrationSet
from quant.passes.run import run_passes
from tinydm.benchmark.growth_chart import Walk, draw_growth, straightness
from tinydm.benchmark.machine import label, machine
from tinydm.benchmark.networks import random_network
from tinydm.names import find_yaml
from tinydm.recipe import RunConfig, load_recipe
from tinydm.stages.quantize import prepare

PASS = "reconstruct"
# ranges are not what is measured, and those that the method searches for take a minute
RANGES = "exceptions=[{match: '*', weight: {range: minmax}, input: {range: minmax}}]"
log = logging.getLogger("tinydm").info


@dataclass
class GrowthConfig:
    """What is measured."""

    network: str = "cifar10"  # a name of configs/model
    samples: list[int] = field(default_factory=lambda: [8, 16, 32, 64])  # of calibration, in turn
    iters: int = 1  # optimizer steps of a unit on weights, then as many on scales
    batch_size: int = 4  # samples of a step
    threads: int = 1  # of the processor
    out: str = "runs/growth"  # folder of the results


def run(words: list[str]) -> None:
    config = load(GrowthConfig, [], words)
    check(config)
    recipe, walks = recipe_of(config), []
    for samples in config.samples:
        walks.append(measure(recipe, samples, config.threads))
        log(f"benchmark: {samples} samples, {walks[-1].seconds[-1]:.1f} CPU seconds")
    folder, facts = Path(config.out), machine(torch.device("cpu"), config.threads)
    found = {"machine": facts, "asked": asdict(config), "walks": list(map(asdict, walks))}
    write_text(folder / "growth.json", json.dumps(found))
    draw_growth(walks, f"{recipe.name}; {label(facts)}", folder / "calibration-growth.png")
    log(f"benchmark: {straightness(walks)}; {folder}/calibration-growth.png shows it")


def check(config: GrowthConfig) -> None:
    """Raises ValueError for what types alone do not catch, before any work begins."""
    for key in ("iters", "batch_size", "threads"):
        if getattr(config, key) < 1:
            raise ValueError(f"{key} is {getattr(config, key)}; it must be at least 1")
    if min(config.samples, default=0) < 1 or len(set(config.samples)) < 2:
        raise ValueError(f"samples is {config.samples}; name two numbers at least, each above 0")


def recipe_of(config: GrowthConfig) -> RunConfig:
    """Q-Diffusion at W4A8 with few steps. Raises ValueError for no model."""
    names = (config.network, "model"), ("w4a8", "bits"), ("qdiffusion", "method")
    steps = {"weight_iters": config.iters, "input_iters": config.iters}
    effort = steps | {"batch_size": config.batch_size}
    words = [RANGES, *(f"effort.{key}={value}" for key, value in effort.items())]
    recipe = load_recipe([find_yaml(name, [kind]) for name, kind in names], words)
    if not recipe.network or recipe.cond_stage or recipe.network.get("num_classes"):
        raise ValueError(
            f"{config.network} is no network without a condition, which noise alone can be fed to; "
            "name another file of configs/model"
        )
    return recipe


def random_model(recipe: RunConfig) -> DiffusionModel:
    """The network of a recipe with random weights, without a first stage."""
    net = random_network(recipe.network)
    shape = net.in_channels, net.image_size, net.image_size
    return DiffusionModel(recipe.name, net, make_schedule(**recipe.schedule), shape, "")


def measure(recipe: RunConfig, samples: int, threads: int = 1) -> Walk:
    """Reconstructs such a network on so many samples of noise."""
    model, rng = random_model(recipe), torch.Generator().manual_seed(0)
    times = torch.linspace(0, 999, samples)
    data = CalibrationSet(torch.randn(samples, *model.shape, generator=rng), times)
    ends: dict[str, float] = {}  # when units were done; a unit without anything to learn has none
    parts: dict[str, float] = {}

    def note(facts: list[dict[str, Any]]) -> None:
        last = facts[-1]
        if last["pass"] != PASS:
            ends[""] = time.process_time()  # when the first unit began
        elif "unit" in last:
            ends[last["unit"]] = time.process_time()
        parts.update(last.get("parts", {}))

    with exact_arithmetic(threads), TemporaryDirectory() as scratch:
        job = prepare(model, recipe, data, Path(scratch), log=lambda line: None, note=note)
        run_passes(job, recipe.all_passes)
    started, macs = ends.pop(""), job.graph.macs
    inside = [
        sum(count for layer, count in macs.items() if f"{layer}.".startswith(f"{unit}."))
        for unit in ends
    ]
    return Walk(samples, list(ends), [end - started for end in ends.values()], inside, parts)

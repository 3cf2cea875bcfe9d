"""Give a network with scales that are a function of time (TDQ) the steps of another sampler,
without calibration:

    python scripts/retabulate.py RUN out=OTHER sampling.steps=50 [sampling.skip=uniform ...]

Reads RUN/quantized.safetensors and RUN/dynamic.safetensors (the functions), writes the run folder
OTHER with the same integers and the table of scales at the new steps, where sample.py goes on."""

from __future__ import annotations

from dataclasses import asdict

import torch

from base.config import load, one_folder
from base.files import load_tensors
from models.zoo import build_network
from quant.checkpoint import load_quantized, read_recipe, save_quantized
from quant.passes.dynamic_scales import retabulated, retimed
from quant.timeline import Timeline
from tinydm.recipe import RunConfig, check, network_times
from tinydm.run_folder import Run, open_run, write_config
from tinydm.stages.quantize import write_map


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    folder, words = one_folder(arguments)
    if not any(word.startswith("out=") for word in words):
        raise ValueError("say where the run with the other steps lives: out=FOLDER")
    if any(not word.startswith(("out=", "sampling.")) for word in words):
        raise ValueError(f"only sampling.* can change here, found {' '.join(words)}")
    before = open_run(folder)
    print(retabulate(before, load(RunConfig, [before.path("config.yaml")], words)))


def retabulate(before: Run, config: RunConfig) -> str:
    """Makes the run folder of `config`, the recipe of `before` but for sampling and folder; returns
    what was done as a sentence."""
    # Nothing is calibrated here; the recipe in the quantized file says how it was.
    config.calibration.steps = min(config.calibration.steps, config.sampling.steps)
    check(config)
    after = Run(config)
    made = after.path("quantized.safetensors")
    if made.exists():
        remedy = "choose another out= folder"
        raise ValueError(f"{after.folder} holds a quantized model already; {remedy}")
    path, dynamic = before.need(made.name, "quantize"), before.path("dynamic.safetensors")
    if not dynamic.exists():
        raise ValueError(
            f"{before.folder} is of the method {before.config.method}, whose scales are no "
            "functions of time; only a run of tdq or of training with dynamic=true has tables for "
            "other steps"
        )
    functions, _ = load_tensors(dynamic)
    times = sorted(network_times(config))
    recipe, boundaries = read_recipe(path)
    nearest = Timeline(boundaries).segments_of(torch.tensor(times)).tolist()
    write_config(after)
    with after.stage("quantize"):
        net = retabulated(load_quantized(path, build_network), functions, times)
        write_map(after, net)
        rules = retimed(recipe["rules"], nearest)
        sampling = asdict(config.sampling)
        changes = {"sampling": sampling, "retabulated": sampling, "rules": rules}
        save_quantized(made, net, recipe | changes)
    further = f"go on with: python scripts/sample.py {after.folder}"
    return f"retabulate: {made}, {net.timeline.num_segments} steps; {further}"

"""Give a network with scales that are a function of time (TDQ) the steps of another sampler,
without calibration:

    python scripts/retabulate.py RUN out=OTHER sampling.steps=50 [sampling.skip=uniform ...]

Reads RUN/quantized.safetensors and RUN/dynamic.safetensors (the functions), writes the run folder
OTHER with the same integers and the table of scales at the new steps; sample.py, evaluate.py and
report.py go on from there."""

from dataclasses import asdict

import torch

from base.config import load, one_folder
from base.files import load_tensors
from models.diffusion import example_arguments
from models.zoo import build_network
from quant.checkpoint import load_quantized, read_recipe, save_quantized
from quant.graph import trace
from quant.passes.dynamic_scales import retabulated, retimed
from quant.timeline import Timeline
from tinydm.recipe import RunConfig, check, network_times
from tinydm.run_folder import Run, open_run, write_config
from tinydm.stages.quantize import write_map


def run(arguments):
    folder, words = one_folder(arguments)
    if not any(word.startswith("out=") for word in words):
        raise ValueError("say where the run with the other steps lives: out=FOLDER")
    if any(not word.startswith(("out=", "sampling.")) for word in words):
        raise ValueError(f"only sampling.* can change here, found {' '.join(words)}")
    before = open_run(folder)
    after = Run(load(RunConfig, [before.path("config.yaml")], words))
    # Nothing is calibrated here; the recipe in the quantized file says how it was.
    after.config.calibration.steps = min(
        after.config.calibration.steps, after.config.sampling.steps
    )
    check(after.config)
    if after.path("quantized.safetensors").exists():
        raise ValueError(
            f"{after.folder} holds a quantized model already; choose another out= folder"
        )
    path = before.need("quantized.safetensors", "quantize")
    if not before.path("dynamic.safetensors").exists():
        raise ValueError(
            f"{folder} is of the method {before.config.method}, whose scales are no functions of "
            "time; "
            "only a run of tdq or of training with dynamic=true has tables for other steps"
        )
    tensors, _ = load_tensors(before.path("dynamic.safetensors"))
    times = sorted(network_times(after.config))
    recipe, boundaries = read_recipe(path)
    nearest = Timeline(boundaries).segments_of(torch.tensor(times)).tolist()
    write_config(after)
    with after.stage("quantize"):
        net = retabulated(load_quantized(path, build_network), tensors, times)
        write_map(
            after,
            net,
            trace(after.model.net, example_arguments(asdict(after.config), after.model.net)),
        )
        save_quantized(
            after.path("quantized.safetensors"),
            net,
            recipe
            | {
                "retabulated": asdict(after.config)["sampling"],
                "rules": retimed(recipe["rules"], nearest),
            },
        )
    print(
        f"retabulate: {after.path('quantized.safetensors')}, {net.timeline.num_segments} steps; "
        "go on with: python "
        f"scripts/sample.py {after.folder}"
    )

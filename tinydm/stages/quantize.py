"""Quantize the model of a run folder:  python scripts/quantize.py RUN [memory_gb=8] [force=true]
What would be done, by shapes alone, without weights:

    python scripts/quantize.py configs/model/MODEL.yaml configs/bits/BITS.yaml
    configs/method/METHOD.yaml \\
        [configs/preset/demo.yaml] dry_run=true [key=value ...]

Reads RUN/calibration.safetensors, writes RUN/quantized.safetensors, RUN/passes.jsonl (error before
and after of each unit), RUN/map.json and RUN/map.txt (what is quantized). Started again it goes on
after the last finished unit. """

import json
from dataclasses import asdict
from functools import partial

import torch

from base.config import one_folder, split_arguments
from base.files import save_tensors, write_text
from models.diffusion import example_arguments
from models.sampling import denoise, sample
from models.zoo import build_network
from quant.calibration.files import load_calibration
from quant.checkpoint import packed_bytes, save_quantized
from quant.convert import convert
from quant.graph import captured_bytes, trace
from quant.inventory import format_map, quantization_map
from quant.passes.dynamic_scales import functions_of
from quant.passes.job import Job
from quant.passes.run import run_passes
from quant.timeline import Timeline
from tinydm.recipe import boundaries, check, load_recipe, network_times
from tinydm.run_folder import open_run

DRY_RUN = "dry_run=true"


def run(arguments):
    if DRY_RUN in arguments:
        files, words = split_arguments([a for a in arguments if a != DRY_RUN])
        print(plan(load_recipe(files, ["out=none", *words])))
    else:
        quantize(open_run(*one_folder(arguments)))


def plan(config):
    """What quantizing this configuration comes to, as text; no weights are needed or made."""
    check(config)
    with torch.device("meta"):
        net = build_network(**config.network)
    quantized, graph = (
        convert(net, config.all_rules, Timeline(boundaries(config))),
        trace(net, example_arguments(asdict(config), net)),
    )
    c, facts = config.calibration, quantization_map(net, quantized, graph.macs)
    samples = c.steps * c.images * (2 if config.guidance.scale != 1 else 1)
    floats = sum(p.numel() * p.element_size() for p in net.parameters())
    packed, captured = packed_bytes(quantized), captured_bytes(graph, samples)
    return (
        f"{format_map(facts)}\n{config.name}: {len(graph.units)} reconstruction units, "
        f"{sum(graph.macs.values()) / 1e9:.3f} G multiply-adds per image and run of the network\n"
        f"weights: {floats:,} bytes in FP32, {packed:,} quantized, {floats / packed:.2f} x "
        "smaller\n"
        f"calibration: {samples:,} samples; {captured / 2**30:.2f} GiB of activations at the "
        "largest unit, of "
        f"which {min(captured / 2**30, config.memory_gb):.2f} in memory (memory_gb), the rest on "
        "disk"
    )


def quantize(run):
    path = run.path("quantized.safetensors")
    if path.exists() and not run.config.force:
        print(f"quantize: done already, {path}")
        return
    calibration = load_calibration(run.need("calibration.safetensors", "calibrate"))
    model = run.model
    run.begin()
    with run.stage("quantize"):
        net = convert(model.net, run.config.all_rules, Timeline(boundaries(run.config)))
        graph = trace(model.net, calibration.arguments(slice(0, 1)))
        print(write_map(run, net, graph))
        job = Job(
            model=model,
            net=net,
            calibration=calibration,
            graph=graph,
            resume_folder=run.path("resume/quantize"),
            rules=run.config.all_rules,
            seed=run.config.seed,
            max_batch=run.config.max_batch,
            memory_gb=run.config.memory_gb,
            trajectory=partial(trajectory, run),
            differentiable=partial(differentiable, run),
            log=lambda line: print(line, flush=True),
            note=lambda rows: write_text(
                run.path("passes.jsonl"), "".join(json.dumps(r) + "\n" for r in rows)
            ),
        )
        run_passes(job, run.config.all_passes)
        write_map(run, job.net, graph)  # passes may have changed widths
        functions = functions_of(job.net)
        if functions:
            save_tensors(run.path("dynamic.safetensors"), functions, {})
        save_quantized(path, job.net, run.recipe() | {"rules": job.rules})
    run.finish("quantize")
    ratio = model.float_bytes / path.stat().st_size
    print(
        f"quantize: {path}, {path.stat().st_size:,} bytes, {ratio:.2f} x smaller than "
        f"{model.float_bytes:,} of FP32"
    )


def write_map(run, net, graph):
    """Save what is quantized; returns it as text."""
    facts = quantization_map(run.model.net, net, graph.macs, network_times(run.config))
    write_text(run.path("map.json"), json.dumps(facts, indent=1))
    write_text(run.path("map.txt"), format_map(facts) + "\n")
    return format_map(facts)


def trajectory(run, num_images, seed):
    """Full-precision sampling of images 0 .. num_images-1 of `seed`, batch by batch: (step, t, x,
    cond, eps) of every network evaluation. What a batch leaves waits outside of the accelerator."""
    s, device = run.config.sampling, run.model.device
    for start in range(0, num_images, s.batch_size):
        indices, seen = range(start, min(start + s.batch_size, num_images)), []
        sample(
            run.model,
            run.model.eps,
            indices,
            sampler=s.sampler,
            steps=s.steps,
            skip=s.skip,
            eta=s.eta,
            seed=seed,
            callback=lambda step, t, x, eps, *_: seen.append((step, t, x.cpu(), eps.cpu())),
        )
        cond = run.model.labels(seed, indices)
        for step, t, x, eps in seen:
            yield step, t, x.to(device), cond, eps.to(device)


def differentiable(run, num_images, seed):
    """x_0 of images 0 .. num_images-1 of `seed`, batch by batch, with the gradient by all that the
    float network computes."""
    s, size = run.config.sampling, min(run.config.sampling.batch_size, run.config.max_batch)
    for start in range(0, num_images, size):
        yield denoise(
            run.model,
            run.model.eps,
            range(start, min(start + size, num_images)),
            sampler=s.sampler,
            steps=s.steps,
            skip=s.skip,
            eta=s.eta,
            seed=seed,
            differentiable=True,
        )

"""Block reconstruction (BRECQ, Li et al. 2021, arXiv:2102.05426; Q-Diffusion, Li et al. 2023,
arXiv:2302.04304).

Unit by unit in execution order. In two stages: weights first; learn the rounding so that the unit,
fed by the network quantized so far (activations in full precision), gives the full-precision
output:
    L = lp(out, target; 2) + lambda * sum(1 - |2h - 1|^beta),  beta 20 -> 2 after a warm-up without the second term.
Then, with hard weights, learn the activation scales (LSQ) from full-precision inputs to
full-precision outputs,
    L = lp(out, target; 2.4).
Or jointly (QDrop, Wei et al. 2022, arXiv:2203.05740): rounding and scales at once, fed by the
network with quantized weights and activations, elements of whose output are replaced by
full-precision ones at random."""

import time

import torch

from base.config import Share
from base.seeds import mix
from quant.network import input_quantizers, quant_layers, set_input_quantization
from quant.reconstruction.capture import Store, Stream
from quant.reconstruction.frequency import FrequencyFilter
from quant.reconstruction.learn import learn_jointly, learn_rounding, learn_scales
from quant.reconstruction.saliency import Saliency
from quant.reconstruction.unit import Unit, load_unit, mixed, relative_error, save_unit


def reconstruct(
    job,
    *,
    weight_iters=20000,
    input_iters=5000,
    batch_size=32,
    weight_lr=1e-3,
    input_lr=4e-4,
    soft_lr=1e-4,
    weight_cosine=False,
    round_weight=0.01,
    warmup: Share = 0.2,
    beta_start=20.0,
    beta_end=2.0,
    weight_norm=2.0,
    input_norm=2.4,
    joint=False,
    drop: Share = 0.5,
    layer_weight=0.0,
    saliency: Share = 0.0,
    smooth=0.0,
    frequency: Share = 0.0,
    active=0.0,
    visit_cost=0.0,
    gptq=False,
    bfloat16=False,
):
    """The pass. Counts are optimizer steps per unit, `warmup` a fraction of them, `bfloat16`
    computes the steps under autocast. Captured activations beyond `job.memory_gb` spill to disk.

    Rates of scales fall to 0 along a cosine, that of the rounding only with `weight_cosine`.
    `joint` learns both at once in `weight_iters` steps, each activation unquantized with
    probability `drop`. With `gptq` the rounding begins halfway between the weight and second-order
    codes (quant/gptq.py), else at the weight. `layer_weight` adds the error of a block's inner
    layers. `saliency` in [0, 1] is the share of the error's weights that follows received attention
    (quant/attention.py); `frequency` in [0, 1] how far it is weighed by what errors of each spatial
    frequency do to the image (quant/frequency.py). `smooth` holds the scales of neighbouring time
    segments together. `active` or `visit_cost` > 0 takes the batches from the segment that needs
    them most (quant/learn.py). `soft_lr` is the rate of what gives scales while they are learned
    (quant/tdq.py, quant/apq.py).

    Each finished unit is saved in `job.resume_folder`; a run that is killed and started again ends
    in the same bytes. Returns one fact per unit and stage: error before and after (relative to the
    mean square of the target), seconds."""
    settings = {k: v for k, v in locals().items() if k != "job"} | {"capture_batch": job.batch(64)}
    job.need_ranges("reconstruct")
    store, calibration = Store(job.memory_gb, job.resume_folder), job.calibration
    names, uses = job.graph.units, job.graph.last_use
    original, quantized = (
        Stream(net, names, uses, calibration, batch_size=job.batch(64), store=store)
        for net in (job.model.net, job.net)
    )
    weights_of = Saliency(job.model.net, calibration, saliency, job.batch(64)) if saliency else None
    filters = FrequencyFilter(job, names, frequency) if frequency else None
    segments = job.net.timeline.segments_of(calibration.t)
    set_input_quantization(job.net, joint)
    share, facts, started = shares_of_work(names, job.graph.macs), [], time.monotonic()
    for i, name in enumerate(names):
        path = job.resume_folder / f"{i:03d}_{name}.safetensors"
        unit = Unit(
            name,
            quantized.modules[name],
            quantized.device,
            lambda rows: job.net.timeline.set_time(calibration.t[rows]),
            original=original.modules[name],
            saliency=weights_of,
            segments=segments,
            visits=torch.zeros(job.net.timeline.num_segments),
        )
        if filters:
            unit.frequency = lambda rows, error: filters(name, calibration.t[rows], error)
        unit.float_inputs, quant_inputs = original.inputs(name), quantized.inputs(name)
        target = original.advance(name, unit.float_inputs)
        new = load_unit(unit.module, path) if path.is_file() else None
        if new is None:
            generator = torch.Generator().manual_seed(mix(job.seed, i))
            new = optimise_unit(unit, quant_inputs, target, generator, settings)
            save_unit(unit.module, path, new)
        quantized.advance(name, quant_inputs)
        original.free(unit.float_inputs + quant_inputs)
        del unit, quant_inputs, target
        original.drop_dead(name)
        quantized.drop_dead(name)
        facts += new
        done = sum(share[n] for n in names[: i + 1])
        left = (time.monotonic() - started) * (1 - done) / done
        errors = "  ".join(
            f"{f['stage']} error {f['error_before']:.2e} -> {f['error_after']:.2e}" for f in new
        )
        job.log(f"[{i + 1}/{len(names)}] {name:20} {errors}  about {left:.0f} s left")
        job.note(facts)
    set_input_quantization(job.net, True)
    return facts


def shares_of_work(names, macs):
    """Fraction of the whole work for each unit: half by multiply-adds, half alike, as a step of a
    tiny unit costs time too."""
    work = {
        name: sum(m for layer, m in macs.items() if f"{layer}.".startswith(f"{name}."))
        for name in names
    }
    return {name: work[name] / sum(work.values()) / 2 + 1 / len(names) / 2 for name in names}


def optimise_unit(unit, quant_inputs, target, generator, settings):
    """Learn one unit, which ends hardened; returns its facts. Layers that are hard already stay as
    they are."""
    layers = [
        m
        for m in quant_layers(unit.module).values()
        if m.weight_quantizer is not None and m.weight_int is None
    ]
    quantizers = list(input_quantizers(unit.module).values())
    if settings["joint"]:
        if not layers and not quantizers:
            return []
        inputs = mixed(quant_inputs, unit.float_inputs, generator)
        return [
            measured(
                unit,
                "joint",
                quant_inputs,
                target,
                settings,
                lambda: learn_jointly(
                    unit, layers, quantizers, inputs, target, generator, settings
                ),
            )
        ]
    facts = []
    if layers:
        facts.append(
            measured(
                unit,
                "weight",
                quant_inputs,
                target,
                settings,
                lambda: learn_rounding(unit, layers, quant_inputs, target, generator, settings),
            )
        )
    if quantizers:
        set_input_quantization(unit.module, True)
        facts.append(
            measured(
                unit,
                "input",
                unit.float_inputs,
                target,
                settings,
                lambda: learn_scales(
                    unit, quantizers, unit.float_inputs, target, generator, settings
                ),
            )
        )
        set_input_quantization(unit.module, False)
    return facts


def measured(unit, stage, inputs, target, settings, optimise):
    """Error before, optimise(), error after."""
    batch = settings["capture_batch"]
    before, started = relative_error(unit, inputs, target, batch), time.monotonic()
    optimise()
    return {
        "pass": "reconstruct",
        "stage": stage,
        "unit": unit.name,
        "error_before": before,
        "error_after": relative_error(unit, inputs, target, batch),
        "seconds": time.monotonic() - started,
    }

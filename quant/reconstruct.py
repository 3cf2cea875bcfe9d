"""Block reconstruction (BRECQ, Li et al. 2021, arXiv:2102.05426; Q-Diffusion, Li et al. 2023, arXiv:2302.04304).

Unit by unit in execution order. Weights: learn the rounding so that the unit, fed by the network quantized so far
(activations in full precision), gives the full-precision output:
    L = lp(out, target; 2) + lambda * sum(1 - |2h - 1|^beta),  beta 20 -> 2 after a warm-up without the second term.
Inputs: with hard weights, learn the activation scales (LSQ) from full-precision inputs to full-precision outputs,
    L = lp(out, target; 2.4).
"""
import time
from dataclasses import dataclass
from typing import Callable

import torch

from ddim.sampler import mix
from quant.capture import Store, Stream
from quant.convert import input_quantizers, quant_layers, set_input_quantization
from quant.files import load_tensors, save_tensors
from quant.rounding import Rounding

ERROR_ROWS = 256                           # samples on which the error before and after is measured


def lp(a, b, norm):
    """Sum over axis 1, mean over the rest, of |a - b|^norm: the loss measure of BRECQ and its descendants."""
    return (a - b).abs().pow(norm).sum(1).mean()


def reconstruct(job, *, weight_iters=20000, input_iters=5000, batch_size=32, weight_lr=1e-3, input_lr=4e-4,
                round_weight=0.01, warmup=0.2, beta_start=20.0, beta_end=2.0, weight_norm=2.0, input_norm=2.4,
                bfloat16=False, capture_batch=64, memory_gb=4.0):
    """The pass. Counts are optimizer steps per unit, `warmup` a fraction of them, `memory_gb` the budget for captured
    activations (the rest spills to disk), `bfloat16` computes the steps under autocast.

    Each finished unit is saved in `job.resume_folder`; a run that is killed and started again ends in the same bytes.
    Returns one fact per unit and stage: error before and after (relative to the mean square of the target), seconds.
    """
    settings = {k: v for k, v in locals().items() if k != "job"}
    store, calibration = Store(memory_gb, job.resume_folder), job.calibration
    names, uses = job.graph.units, job.graph.last_use
    original, quantized = (Stream(net, names, uses, calibration, batch_size=capture_batch, store=store)
                           for net in (job.model.net, job.net))
    set_input_quantization(job.net, False)
    share, facts, started = shares_of_work(names, job.graph.macs), [], time.monotonic()
    for i, name in enumerate(names):
        path = job.resume_folder / f"{i:03d}_{name}.safetensors"
        unit = Unit(name, quantized.modules[name], quantized.device,
                    lambda rows: job.net.timeline.set_time(calibration.t[rows]))
        float_inputs, quant_inputs = original.inputs(name), quantized.inputs(name)
        target = original.advance(name, float_inputs)
        if path.is_file():
            new = load_unit(unit.module, path)
        else:
            generator = torch.Generator().manual_seed(mix(job.seed, i))
            new = optimise_unit(unit, quant_inputs, float_inputs, target, generator, settings)
            save_unit(unit.module, path, new)
        quantized.advance(name, quant_inputs)
        original.free(float_inputs + quant_inputs)
        del float_inputs, quant_inputs, target
        original.drop_dead(name)
        quantized.drop_dead(name)
        facts += new
        done = sum(share[n] for n in names[:i + 1])
        left = (time.monotonic() - started) * (1 - done) / done
        errors = "  ".join(f"{f['stage']} error {f['error_before']:.2e} -> {f['error_after']:.2e}" for f in new)
        job.log(f"[{i + 1}/{len(names)}] {name:20} {errors}  about {left:.0f} s left")
        job.note(facts)
    set_input_quantization(job.net, True)
    return facts


def shares_of_work(names, macs):
    """Fraction of the whole work for each unit: half by multiply-adds, half alike, as a step of a tiny unit costs time
    too."""
    work = {name: sum(m for layer, m in macs.items() if f"{layer}.".startswith(f"{name}.")) for name in names}
    return {name: work[name] / sum(work.values()) / 2 + 1 / len(names) / 2 for name in names}


@dataclass
class Unit:
    """A unit of the quantized network as it is being learned."""
    name: str
    module: torch.nn.Module
    device: torch.device
    set_time: Callable                     # tells the timeline which calibration rows are about to run

    def __call__(self, inputs, rows):
        self.set_time(rows)
        x = [a[rows].to(self.device) for a in inputs]
        return self.module(*(a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in x))


def optimise_unit(unit, quant_inputs, float_inputs, target, generator, settings):
    """Both stages for one unit, which ends hardened; returns their facts."""
    facts = []
    layers = [m for m in quant_layers(unit.module).values() if m.weight_quantizer is not None]
    if layers:
        facts.append(measured(unit, "weight", quant_inputs, target,
                              lambda: learn_rounding(unit, layers, quant_inputs, target, generator, settings)))
    quantizers = list(input_quantizers(unit.module).values())
    if quantizers:
        set_input_quantization(unit.module, True)
        facts.append(measured(unit, "input", float_inputs, target,
                              lambda: learn_scales(unit, quantizers, float_inputs, target, generator, settings)))
        set_input_quantization(unit.module, False)
    return facts


def measured(unit, stage, inputs, target, optimise):
    """Error before, optimise(), error after."""
    before, started = relative_error(unit, inputs, target), time.monotonic()
    optimise()
    return {"pass": "reconstruct", "stage": stage, "unit": unit.name, "error_before": before,
            "error_after": relative_error(unit, inputs, target), "seconds": time.monotonic() - started}


@torch.no_grad()
def relative_error(unit, inputs, target):
    """mean square of (unit(inputs) - target) over mean square of target, on an even pick of the samples."""
    rows = torch.linspace(0, len(target) - 1, min(ERROR_ROWS, len(target))).long()
    error = power = 0.0
    for part in rows.split(64):
        wanted = target[part].to(unit.device)
        error += float((unit(inputs, part) - wanted).square().sum())
        power += float(wanted.square().sum())
    return error / max(power, 1e-30)


def learn_rounding(unit, layers, inputs, target, generator, s):
    for layer in layers:
        layer.rounding = Rounding(layer.weight, layer.weight_quantizer)
    parameters = [layer.rounding.alpha for layer in layers]
    optimizer = torch.optim.Adam(parameters, lr=s["weight_lr"])
    for step in range(s["weight_iters"]):
        progress = step / s["weight_iters"]
        loss = batch_loss(unit, inputs, target, generator, s, s["weight_norm"])
        if progress >= s["warmup"]:
            done = (progress - s["warmup"]) / (1 - s["warmup"])
            beta = s["beta_start"] + (s["beta_end"] - s["beta_start"]) * done
            loss = loss + s["round_weight"] * sum(layer.rounding.penalty(beta) for layer in layers)
        descend(optimizer, loss, parameters)
    for layer in layers:
        layer.harden()


def learn_scales(unit, quantizers, inputs, target, generator, s):
    """16-bit quantizers (softmax outputs of text models) keep their scale, as in the released code."""
    parameters = [q.scale.requires_grad_(True) for q in quantizers if q.spec.bits < 16]
    if not parameters:
        return
    optimizer = torch.optim.Adam(parameters, lr=s["input_lr"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(s["input_iters"], 1))
    for _ in range(s["input_iters"]):
        descend(optimizer, batch_loss(unit, inputs, target, generator, s, s["input_norm"]), parameters)
        schedule.step()
        for scale in parameters:
            scale.data.clamp_(min=1e-8)
    for scale in parameters:
        scale.requires_grad_(False)


def batch_loss(unit, inputs, target, generator, s, norm):
    rows = torch.randint(len(target), (s["batch_size"],), generator=generator)
    with torch.autocast(unit.device.type, torch.bfloat16, enabled=s["bfloat16"]):
        out = unit(inputs, rows)
    return lp(out.float(), target[rows].to(unit.device), norm)


def descend(optimizer, loss, parameters):
    for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
        parameter.grad = grad
    optimizer.step()


def save_unit(module, path, facts):
    """Everything reconstruction decided: integer weights and activation scales."""
    tensors = {f"{name}|weight_int": layer.weight_int.to(torch.int16) for name, layer in quant_layers(module).items()
               if layer.weight_int is not None}
    tensors |= {f"{name}|scale": q.scale for name, q in input_quantizers(module).items()}
    save_tensors(path, tensors or {"empty": torch.zeros(1)}, {"facts": facts})


def load_unit(module, path):
    """Put a saved unit back; returns its facts."""
    layers, quantizers = quant_layers(module), input_quantizers(module)
    tensors, meta = load_tensors(path)
    for key, value in tensors.items():
        name, _, part = key.partition("|")
        if part == "weight_int":
            layers[name].harden()
            layers[name].weight_int.copy_(value)
        elif part == "scale":
            quantizers[name].scale.data.copy_(value)
    return meta["facts"]

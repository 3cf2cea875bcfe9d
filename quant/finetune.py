"""Fine-tuning of the whole quantized network towards the full-precision one; integer weights stay as they are.

    minimise E ln ||eps_q(x, t) - eps(x, t)||^2   over calibration samples (x, t)

where eps is all that the network answers, a learned variance included: up to a factor the mean SQNR in dB. Without the
logarithm the last steps, where eps is least exact (a hundred times the mean square of the first steps at W4A4), would
be learned at the cost of the first, whose errors count most for the image.

Block reconstruction makes each unit right by itself; what is left of their errors adds up along the network. Here all
that is not an integer is learned together against the network's answer: scales of activations and of weights, biases,
and the affine parameters of norms (selective fine-tuning as in QuEST, Wang et al. 2024, arXiv:2402.03666; the error of
the whole network as in APQ-DM, arXiv:2305.18723). All of it is stored anyway and costs nothing at run time.
"""
import math
import time

import torch
from torch import nn

from quant.convert import input_quantizers, quant_layers
from quant.files import load_tensors, save_tensors

NORMS = (nn.GroupNorm, nn.LayerNorm)
ERROR_SAMPLES = 256                        # on which the error before and after is measured
SMALLEST = 1e-8                            # scale
SAVED_EVERY = 50                           # steps


def finetune(job, *, iters=500, scale_lr=2e-3, bias_lr=1e-3, batch_size=16, bfloat16=False):
    """The pass, after those that fit and reconstruct: `iters` Adam steps under a cosine schedule. `scale_lr` is
    relative to the mean of a table of scales; `bias_lr`, of biases and norms, is absolute. `bfloat16` computes under
    autocast.

    Weights are hardened first. Tables of scales that a function of time or groups gave (dynamic_scales, group_scales)
    stay as these gave them. If the error has not fallen in the end (that of 8 bits leaves little to learn), all is
    put back as it was. The state is saved in `job.resume_folder` on the way; a run that is killed and started again
    ends in the same bytes.

    Returns one fact: mean square of eps_q - eps before and after, the geometric mean over calibration samples. Raises
    ValueError before fit_ranges, and for a network with own weights for every time segment.
    """
    options = {key: value for key, value in locals().items() if key != "job"}
    job.need_ranges("finetune")
    if any(layer.has_segments for layer in quant_layers(job.net).values()):
        raise ValueError("finetune learns one network for all steps, this one has own weights for every time segment; "
                         "leave out finetune, or segment_models and per_segment")
    for module in [*quant_layers(job.net).values(), *input_quantizers(job.net).values()]:
        module.harden()
    before, started = error(job, batch_size), time.monotonic()
    groups, path = learned(job.net, scale_lr, bias_lr), job.resume_folder / "finetune.safetensors"
    rates, optimizer = [group["lr"] for group in groups], torch.optim.Adam(groups)
    scales, parameters = ([p for g in gs for p in g["params"]] for gs in (groups[1:], groups))
    original = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(job.seed)
    begun = {"options": options, "error": before}          # what a saved state must have begun with to be this one's
    done = load_state(path, begun, parameters, optimizer, generator)
    for step in range(done + 1, iters + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / iters)) / 2
        rows = torch.randint(len(job.calibration), (batch_size,), generator=generator)
        arguments = [a.to(job.device) for a in job.calibration.arguments(rows)]
        with torch.no_grad():
            target = job.model.net(*arguments)
        with torch.autocast(job.device.type, torch.bfloat16, enabled=bfloat16):
            found = job.net(*arguments)
        loss = log_error(found.float(), target)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True)):
            parameter.grad = grad
        optimizer.step()
        for scale in scales:
            scale.data.clamp_(min=SMALLEST)
        if step % SAVED_EVERY == 0 or step == iters:
            save_state(path, begun | {"step": step}, parameters, optimizer, generator)
            left = (time.monotonic() - started) * (iters - step) / (step - done)
            job.log(f"finetune: step {step} of {iters}, error {loss.exp().item():.2e}, about {left:.0f} s left")
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    after = error(job, batch_size)
    if not after < before:                                 # nor where it has become NaN
        after = before
        for parameter, value in zip(parameters, original):
            parameter.copy_(value)
    return [{"pass": "finetune", "unit": "whole network", "error_before": before, "error_after": after}]


def learned(net, scale_lr, bias_lr):
    """Optimizer groups: first biases and norms, set apart from the float network, which shared them; then each table of
    scales."""
    layers, own = quant_layers(net).values(), []
    for module in net.modules():
        names = ("weight", "bias") if isinstance(module, NORMS) else ("bias",) if module in layers else ()
        for name in names:
            if getattr(module, name) is not None:
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
                own.append(getattr(module, name))
    quantizers = [q for q in input_quantizers(net).values() if q.learnable and q.made_by is None]
    quantizers += [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    return [{"params": own, "lr": bias_lr}, *({"params": [q.scale.requires_grad_(True)],
                                               "lr": scale_lr * q.scale.mean().item()} for q in quantizers)]


def save_state(path, facts, parameters, optimizer, generator):
    tensors = {"generator": generator.get_state()}
    for i, parameter in enumerate(parameters):
        tensors[f"{i}"] = parameter.data
        tensors |= {f"{i}.{key}": value for key, value in optimizer.state[parameter].items()}
    save_tensors(path, tensors, facts)


def load_state(path, begun, parameters, optimizer, generator):
    """Continue from `save_state`, if that was of a run that began alike; returns the steps done."""
    tensors, facts = load_tensors(path) if path.is_file() else ({}, {})
    if {key: facts.get(key) for key in begun} != begun:
        return 0
    generator.set_state(tensors.pop("generator"))
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(tensors[f"{i}"])
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if f"{i}.{key}" in tensors:
                device = "cpu" if key == "step" else parameter.device
                optimizer.state[parameter][key] = tensors[f"{i}.{key}"].to(device)
    return facts["step"]


def log_error(found, target):
    """Mean over samples of the logarithm of their mean square error; 0 counts as SMALLEST ** 2."""
    return (found - target).square().flatten(1).mean(1).clamp(min=SMALLEST ** 2).log().mean()


@torch.no_grad()
def error(job, batch_size):
    """Mean square of eps_q - eps, the geometric mean over calibration samples."""
    sample, total = job.calibration.subset(ERROR_SAMPLES, job.seed), 0.0
    for arguments in sample.batches(batch_size):
        arguments = [a.to(job.device) for a in arguments]
        total += len(arguments[0]) * float(log_error(job.net(*arguments), job.model.net(*arguments)))
    return math.exp(total / len(sample))

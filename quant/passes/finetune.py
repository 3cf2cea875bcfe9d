"""Fine-tuning of the whole quantized network towards the full-precision one; integer weights stay
as they are.

    minimise E [ mean_k ||e_k||^2 + ||sum_k e_k||^2 / K ] / 2,   e_k = (eps_q(x_k, t_k) - eps(x_k, t_k)) / b(t_k)

over stretches of K successive calibration samples x_1 .. x_K of one trajectory; ||.||^2 is the mean
square of all that the network answers, a learned variance included, and b(t) the root mean square
of the error at t before the pass. Without b the last steps, where eps is least exact (a hundred
times the mean square of the first steps at W4A4), would be learned at the cost of the first, whose
errors count most for the image. The second term is what the sampler sums up: errors that are alike
from step to step make more of the image's error than as large ones that are not. Where successive
errors are independent both terms are alike, 1 before the pass.

Block reconstruction makes each unit right by itself; what is left of their errors adds up along the
network. Here all that is not an integer is learned together against the network's answer: scales of
activations and of weights, biases, and the affine parameters of norms (selective fine-tuning as in
QuEST, Wang et al. 2024, arXiv:2402.03666; the error of the whole network as in APQ-DM,
arXiv:2305.18723). All of it is stored anyway and costs nothing at run time."""

import math
import time

import numpy as np
import torch
from torch import nn

from base.files import load_tensors, save_tensors
from quant.network import input_quantizers, quant_layers

NORMS = (nn.GroupNorm, nn.LayerNorm)
ERROR_SAMPLES = 256  # on which the error before and after is measured
SMALLEST = 1e-8  # scale
SAVED_EVERY = 50  # steps


def finetune(
    job, *, iters=500, scale_lr=1e-3, bias_lr=1e-3, stretch=8, batch_size=16, bfloat16=False
):
    """The pass, after those that fit and reconstruct: `iters` Adam steps under a cosine schedule.
    `scale_lr` is relative to the mean of a table of scales; `bias_lr`, of biases and norms, is
    absolute. A batch is made of stretches of `stretch` samples (K above; fewer where no trajectory
    has as many), one at least. `bfloat16` computes under autocast.

    Weights are hardened first. Tables of scales that a function of time or groups gave
    (dynamic_scales, group_scales) stay as these gave them. If the error has not fallen in the end
    (that of 8 bits leaves little to learn), all is put back as it was. The state is saved in
    `job.resume_folder` on the way; a run that is killed and started again ends in the same bytes.

    Returns one fact: the objective before and after. Raises ValueError before fit_ranges, for a
    network with own weights for every time segment, and where the calibration file does not tell
    trajectories."""
    options = {key: value for key, value in locals().items() if key != "job"}
    job.need_ranges("finetune")
    if any(layer.has_segments for layer in quant_layers(job.net).values()):
        raise ValueError(
            "finetune learns one network for all steps, this one has own weights for every time "
            "segment; "
            "leave out finetune, or segment_models and per_segment"
        )
    for module in [*quant_layers(job.net).values(), *input_quantizers(job.net).values()]:
        module.harden()
    started, stretches = time.monotonic(), job.calibration.stretches(stretch)
    each = max(1, batch_size // stretches.shape[1])  # stretches in a batch
    batches = some(stretches, each, job.seed)
    errors = errors_of(job, batches)
    level = rms_by_step(job.calibration.t, batches, errors)
    before = error(errors, batches, level)
    groups, path = learned(job.net, scale_lr, bias_lr), job.resume_folder / "finetune.safetensors"
    rates, optimizer = [group["lr"] for group in groups], torch.optim.Adam(groups)
    scales, parameters = ([p for g in gs for p in g["params"]] for gs in (groups[1:], groups))
    original = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(job.seed)
    # what a saved state must have begun with to be this one's
    begun = {"options": options, "error": before}
    done = load_state(path, begun, parameters, optimizer, generator)
    for step in range(done + 1, iters + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / iters)) / 2
        rows = torch.randint(len(stretches), (each,), generator=generator)
        loss = objective(eps_error(job, stretches[rows], bfloat16), level[stretches[rows]])
        for parameter, grad in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True)
        ):
            parameter.grad = grad
        optimizer.step()
        for scale in scales:
            scale.data.clamp_(min=SMALLEST)
        if step % SAVED_EVERY == 0 or step == iters:
            save_state(path, begun | {"step": step}, parameters, optimizer, generator)
            left = (time.monotonic() - started) * (iters - step) / (step - done)
            job.log(
                f"finetune: step {step} of {iters}, error {loss.item():.3f}, about {left:.0f} s "
                "left"
            )
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    after = error(errors_of(job, batches), batches, level)
    if not after < before:  # nor where it has become NaN
        after = before
        for parameter, value in zip(parameters, original):
            parameter.copy_(value)
    return [
        {"pass": "finetune", "unit": "whole network", "error_before": before, "error_after": after}
    ]


def learned(net, scale_lr, bias_lr):
    """Optimizer groups: first biases and norms, set apart from the float network, which shared
    them; then each table of scales."""
    layers, own = quant_layers(net).values(), []
    for module in net.modules():
        names = (
            ("weight", "bias")
            if isinstance(module, NORMS)
            else ("bias",)
            if module in layers
            else ()
        )
        for name in names:
            if getattr(module, name) is not None:
                setattr(module, name, nn.Parameter(getattr(module, name).detach().clone()))
                own.append(getattr(module, name))
    quantizers = [q for q in input_quantizers(net).values() if q.learnable and q.made_by is None]
    quantizers += [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    return [
        {"params": own, "lr": bias_lr},
        *(
            {"params": [q.scale.requires_grad_(True)], "lr": scale_lr * q.scale.mean().item()}
            for q in quantizers
        ),
    ]


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


def eps_error(job, rows, bfloat16=False):
    """eps_q - eps of the calibration samples `rows` (M, K) -> (M, K, values)."""
    arguments = [a.to(job.device) for a in job.calibration.arguments(rows.flatten())]
    with torch.no_grad():
        target = job.model.net(*arguments)
    with torch.autocast(job.device.type, torch.bfloat16, enabled=bfloat16):
        found = job.net(*arguments)
    return (found.float() - target).flatten(1).unflatten(0, rows.shape)


def objective(errors, level):
    """Of errors (M, K, values) and b (M, K)."""
    e = errors / level.to(errors.device)[:, :, None]
    return (e.square().mean() + (e.sum(1) / e.shape[1] ** 0.5).square().mean()) / 2


def some(stretches, each, seed):
    """About ERROR_SAMPLES samples in batches of `each` stretches."""
    order = torch.randperm(len(stretches), generator=torch.Generator().manual_seed(seed))
    return stretches[order[: max(1, ERROR_SAMPLES // stretches.shape[1])]].split(each)


@torch.no_grad()
def errors_of(job, batches):
    return [eps_error(job, rows).cpu() for rows in batches]


def rms_by_step(t, batches, errors):
    """b at the step of every calibration sample, t (N,) -> (N,), interpolated between those of the
    `batches`, whose errors these are."""
    squares = torch.cat([e.square().mean(2).flatten() for e in errors])
    seen, at = t[torch.cat(batches).flatten()].unique(return_inverse=True)
    mean = torch.zeros(len(seen)).index_add(0, at, squares) / at.bincount()
    return (
        torch.from_numpy(np.interp(t.numpy(), seen.numpy(), mean.numpy()))
        .float()
        .clamp(min=SMALLEST**2)
        .sqrt()
    )


def error(errors, batches, level):
    """The objective over all of `batches`."""
    total = sum(len(rows) * float(objective(e, level[rows])) for e, rows in zip(errors, batches))
    return total / sum(map(len, batches))

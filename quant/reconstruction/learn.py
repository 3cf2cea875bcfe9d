"""What block reconstruction optimises in one unit: losses, and what is learned.

    lp(a, b; p) = mean over samples and positions of sum over channels |a - b|^p                       (BRECQ's measure)
    L = lp(out, target) + layer_weight * sum over inner layers lp(out_j, target_j) + round_weight * rounding penalty

`layer_weight` is the fine-grained block reconstruction of EDA-DM (Liu et al. 2024,
arXiv:2401.04585), random dropping of quantization that of QDrop (Wei et al. 2022,
arXiv:2203.05740). Positions may be weighted by their saliency."""

import math

import torch

from quant.network import input_quantizers
from quant.reconstruction.gptq import second_order_codes
from quant.reconstruction.loss import comparable, lp, output_loss, outputs_of
from quant.reconstruction.rounding import Rounding
from quant.reconstruction.unit import uniform_like


def learn_rounding(unit, layers, inputs, target, generator, s):
    """Weights: AdaRound. Settings `s` are the options of quant.reconstruct.reconstruct. No scale is
    learned here whose doubts could choose batches actively."""
    begin_rounding(unit, layers, inputs, target, generator, s)
    s = s | {"active": 0.0, "visit_cost": 0.0}
    groups = [rounding_group(layers, s)]
    optimise(
        unit,
        groups,
        s["weight_iters"],
        lambda done: rounding_penalty(layers, done, s),
        inputs,
        target,
        generator,
        s,
        s["weight_norm"],
    )
    for layer in layers:
        layer.harden()


def learn_scales(unit, quantizers, inputs, target, generator, s):
    """Activation scales: LSQ."""
    learned = [q for q in quantizers if q.learnable]
    groups = scale_groups(learned, s)
    if groups:
        optimise(
            unit,
            groups,
            s["input_iters"],
            lambda done: scale_penalty(learned, s),
            inputs,
            target,
            generator,
            s,
            s["input_norm"],
        )
    end_scales(learned)


def learn_jointly(unit, layers, quantizers, inputs, target, generator, s):
    """Rounding and scales in one stage, quantization of activations dropped at random (QDrop)."""
    begin_rounding(unit, layers, inputs, target, generator, s)
    learned = [q for q in quantizers if q.learnable]
    groups = scale_groups(learned, s)
    if layers:
        groups.insert(0, rounding_group(layers, s))
    for q in quantizers:
        q.drop = lambda x: uniform_like(x, generator) < s["drop"]
    try:
        if groups:
            optimise(
                unit,
                groups,
                s["weight_iters"],
                lambda done: rounding_penalty(layers, done, s) + scale_penalty(learned, s),
                inputs,
                target,
                generator,
                s,
                s["weight_norm"],
            )
    finally:
        for q in quantizers:
            q.drop = None
    for layer in layers:
        layer.harden()
    end_scales(learned)


def begin_rounding(unit, layers, inputs, target, generator, s):
    """From the weights or, with `gptq`, from halfway to second-order codes."""
    starts = [None] * len(layers)
    if s["gptq"]:
        starts = second_order_codes(
            unit, layers, inputs, len(target), generator, s["capture_batch"]
        )
    for layer, start in zip(layers, starts):
        layer.rounding = Rounding(layer.weight, layer.weight_quantizer, start)


def rounding_group(layers, s):
    return {
        "params": [layer.rounding.alpha for layer in layers],
        "lr": s["weight_lr"],
        "cosine": s["weight_cosine"],
    }


def rounding_penalty(layers, done, s):
    """lambda * sum(1 - |2h - 1|^beta), beta falling after a warm-up without the term."""
    if done < s["warmup"] or not s["round_weight"]:
        return 0.0
    share = (done - s["warmup"]) / (1 - s["warmup"])
    beta = s["beta_start"] + (s["beta_end"] - s["beta_start"]) * share
    return s["round_weight"] * sum(layer.rounding.penalty(beta) for layer in layers)


def scale_groups(quantizers, s):
    """Optimizer groups: tables of scales, and the parameters of whatever gives a table while it is
    learned."""
    free = [q.scale.requires_grad_(True) for q in quantizers if q.soft_scale is None]
    soft = [p for q in quantizers if q.soft_scale is not None for p in q.soft_scale.parameters()]
    groups = [
        {"params": free, "lr": s["input_lr"], "cosine": True},
        {"params": soft, "lr": s["soft_lr"], "cosine": True},
    ]
    return [group for group in groups if group["params"]]


def end_scales(quantizers):
    for q in quantizers:
        q.harden()
        q.scale.requires_grad_(False)


def scale_penalty(quantizers, s):
    """Of soft scales their own; smooth * sum over steps (ln scale_i - ln scale_{i+1})^2: neighbours
    differ little."""
    penalty = sum(q.soft_scale.penalty() for q in quantizers if q.soft_scale is not None)
    if s["smooth"]:
        penalty = penalty + s["smooth"] * sum(
            q.scales().log().diff(dim=0).square().sum() for q in quantizers
        )
    return penalty


def optimise(unit, groups, iters, penalty, inputs, target, generator, s, norm):
    """`iters` Adam steps on `groups`; `penalty(share of the steps done)` is added to the loss of a
    batch."""
    optimizer, rates = torch.optim.Adam(groups), [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    quantizers = input_quantizers(unit.module).values()
    scales = {id(q.scale) for q in quantizers}
    soft = [q.soft_scale for q in quantizers if q.soft_scale is not None]
    for step in range(iters):
        for model in soft:
            model.done = step / iters
        loss = batch_loss(unit, inputs, target, generator, s, norm) + penalty(step / iters)
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.grad = grad
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = (
                rate * (1 + math.cos(math.pi * step / iters)) / 2 if group["cosine"] else rate
            )
        optimizer.step()
        for parameter in parameters:
            if id(parameter) in scales:
                parameter.data.clamp_(min=1e-8)


def batch_loss(unit, inputs, target, generator, s, norm):
    rows = draw_rows(unit, target, generator, s)
    with torch.autocast(unit.device.type, torch.bfloat16, enabled=s["bfloat16"]):
        if not s["layer_weight"]:
            return output_loss(unit, unit(inputs, rows), target, rows, norm)
        names = comparable(unit.module)
        with torch.no_grad(), outputs_of(unit.original, names) as wanted:
            unit.call(unit.original, unit.float_inputs, rows)
        with outputs_of(unit.module, names) as found:
            out = unit(inputs, rows)
        inner = sum(lp(found[name].float(), wanted[name].float(), norm) for name in names)
        return output_loss(unit, out, target, rows, norm) + s["layer_weight"] * inner


def draw_rows(unit, target, generator, s):
    """Samples of one batch: any; or, with `active` or `visit_cost`, all of the time segment that is
    undecided or seldom visited most (APQ-DM, active timestep selection: the paper's second term,
    its released code's third), argmax_t entropy(t) + active / (visits(t) + 1) - visit_cost
    visits(t)."""
    if not (s["active"] or s["visit_cost"]):
        return torch.randint(len(target), (s["batch_size"],), generator=generator)
    soft = [
        q.soft_scale for q in input_quantizers(unit.module).values() if q.soft_scale is not None
    ]
    visits = unit.visits
    score = sum(m.entropy().detach().cpu() for m in soft) / max(len(soft), 1)
    score = score + s["active"] / (visits + 1) - s["visit_cost"] * visits
    # no sample lies there
    score[torch.bincount(unit.segments, minlength=len(score)) == 0] = -torch.inf
    segment = int(score.argmax())
    visits[segment] += 1
    rows = (unit.segments == segment).nonzero()[:, 0]
    return rows[torch.randint(len(rows), (s["batch_size"],), generator=generator)]

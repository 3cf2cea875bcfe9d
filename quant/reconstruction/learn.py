"""What block reconstruction optimises in one unit: losses, and what is learned.

    lp(a, b; p) = mean over samples and positions of sum over channels |a - b|^p
    L = lp(out, target) + layer_weight * sum over inner layers lp(out_j, target_j)
        + round_weight * rounding penalty

lp is BRECQ's measure, `layer_weight` the fine-grained block reconstruction of EDA-DM (Liu et al.
2024, arXiv:2401.04585), random dropping of quantization that of QDrop (Wei et al. 2022,
arXiv:2203.05740). Positions may be weighted by their saliency."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from base.workers import count, share_of, summed
from quant.layers import QuantLayer
from quant.network import input_quantizers
from quant.quantizer import Quantizer
from quant.reconstruction.gptq import second_order_codes
from quant.reconstruction.loss import comparable, lp, output_loss, outputs_of
from quant.reconstruction.rounding import Rounding
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.unit import Inputs, Unit, relative_error, uniform_like

SMALLEST = 1e-8  # scale
Penalty = Callable[[float], torch.Tensor | float]  # of the share of the steps that is done
Groups = list[dict[str, Any]]  # of an optimizer


@dataclass(frozen=True)
class Lesson:
    """All that one phase of a unit learns from: what flows in over all samples, the output (N, ...)
    that is wanted, what to learn towards and how. `generator` draws the samples of a batch and
    what is dropped."""

    unit: Unit
    inputs: Inputs
    target: torch.Tensor
    generator: torch.Generator
    objective: Objective
    schedule: Schedule


def measured(name: str, phase: str, lesson: Lesson, learn: Callable[[], None]) -> dict[str, Any]:
    """Calls `learn`; returns the fact of a phase of the pass `name`."""
    unit, inputs, target = lesson.unit, lesson.inputs, lesson.target
    before, started = relative_error(unit, inputs, target), time.monotonic()
    learn()
    errors = {"error_before": before, "error_after": relative_error(unit, inputs, target)}
    seconds = time.monotonic() - started
    return {"pass": name, "phase": phase, "unit": unit.name, **errors, "seconds": seconds}


def change_of_error(fact: dict[str, Any]) -> str:
    """Says a fact of `measured` in words."""
    return f"{fact['phase']} error {fact['error_before']:.2e} -> {fact['error_after']:.2e}"


def learn_rounding(lesson: Lesson, layers: list[QuantLayer]) -> None:
    """Learns weights: AdaRound. No scale is learned here whose doubts could choose batches
    actively."""
    lesson = replace(lesson, schedule=replace(lesson.schedule, active=0.0, visit_cost=0.0))
    _begin_rounding(lesson, layers)
    _learn(lesson, layers, [], lesson.schedule.weight_iters, lesson.objective.weight_norm)


def learn_scales(lesson: Lesson, quantizers: list[Quantizer]) -> None:
    """Learns scales of activations: LSQ."""
    _learn(lesson, [], quantizers, lesson.schedule.input_iters, lesson.objective.input_norm)


def learn_jointly(lesson: Lesson, layers: list[QuantLayer], quantizers: list[Quantizer]) -> None:
    """Learns rounding and scales in one phase, quantization of activations dropped at random
    (QDrop)."""
    _begin_rounding(lesson, layers)
    unit = lesson.unit
    for q in quantizers:
        q.drop = lambda x: uniform_like(x, lesson.generator, unit.share).lt_(lesson.schedule.drop)
    try:
        _learn(
            lesson, layers, quantizers, lesson.schedule.weight_iters, lesson.objective.weight_norm
        )
    finally:
        for q in quantizers:
            q.drop = None


def _learn(lesson, layers, quantizers, iters, norm):
    """Learns the rounding of `layers`, if any, and the scales of `quantizers`; both end hard."""
    learned = [q for q in quantizers if q.learnable]
    groups = [*_rounding_groups(layers, lesson.schedule), *_scale_groups(learned, lesson.schedule)]

    def penalty(done):
        rounding = rounding_penalty(layers, done, lesson)
        return rounding + scale_penalty(learned, lesson.objective.smooth)

    if groups:
        optimise(lesson, groups, iters, norm, penalty)
    for layer in layers:
        layer.harden()
    for q in learned:
        q.harden()
        q.scale.requires_grad_(False)


def _begin_rounding(lesson, layers):
    """From the weights or, with `gptq`, from halfway to second-order codes."""
    starts = [None] * len(layers)
    if lesson.schedule.gptq:
        count = len(lesson.target)
        starts = second_order_codes(lesson.unit, layers, lesson.inputs, count, lesson.generator)
    for layer, start in zip(layers, starts):
        layer.rounding = Rounding(layer.weight, layer.weight_quantizer, start)


def _rounding_groups(layers, schedule):
    params, rate = [layer.rounding.alpha for layer in layers], schedule.weight_lr
    return [{"params": params, "lr": rate, "cosine": schedule.weight_cosine}] if params else []


def rounding_penalty(layers: list[QuantLayer], done: float, lesson: Lesson) -> torch.Tensor | float:
    """Returns lambda * sum(1 - |2h - 1|^beta), beta falling after a warm-up without the term, when
    the share `done` of the steps is over."""
    schedule, weight = lesson.schedule, lesson.objective.round_weight
    if done < schedule.warmup or not weight:
        return 0.0
    share = (done - schedule.warmup) / (1 - schedule.warmup)
    beta = schedule.beta_start + (schedule.beta_end - schedule.beta_start) * share
    return weight * sum(layer.rounding.penalty(beta) for layer in layers)


def _scale_groups(quantizers, schedule):
    """Tables of scales, and the parameters of whatever gives a table while it is learned."""
    free = [q.scale.requires_grad_(True) for q in quantizers if q.soft_scale is None]
    soft = [p for soft_scale in _soft_scales(quantizers) for p in soft_scale.parameters()]
    rates = ((free, schedule.input_lr), (soft, schedule.soft_lr))
    return [{"params": params, "lr": rate, "cosine": True} for params, rate in rates if params]


def _soft_scales(quantizers):
    return [q.soft_scale for q in quantizers if q.soft_scale is not None]


def scale_penalty(quantizers: list[Quantizer], smooth: float) -> torch.Tensor | float:
    """Returns the penalties of soft scales, and smooth * sum over segments (ln scale_i -
    ln scale_{i+1})^2: neighbours differ little."""
    penalty = sum(soft_scale.penalty() for soft_scale in _soft_scales(quantizers))
    if smooth:
        steps = (q.scales().log().diff(dim=0) for q in quantizers)
        penalty = penalty + smooth * sum(step.square().sum() for step in steps)
    return penalty


def optimise(lesson: Lesson, groups: Groups, iters: int, norm: float, penalty: Penalty) -> None:
    """Takes `iters` Adam steps on `groups`; `penalty` is added to the loss of a batch. Several
    workers (base/workers.py) take the steps together, each with its share of the batch; `loss` is
    then a part of the whole."""
    optimizer, rates = torch.optim.Adam(groups), [group["lr"] for group in groups]
    parameters = [p for group in groups for p in group["params"]]
    quantizers = input_quantizers(lesson.unit.module).values()
    scales = {id(q.scale) for q in quantizers}
    soft = _soft_scales(quantizers)
    for step in range(iters):
        done = step / iters
        for model in soft:
            model.done = done
        loss = batch_loss(lesson, norm) + penalty(done) / count()
        for parameter, grad in zip(parameters, summed(torch.autograd.grad(loss, parameters))):
            parameter.grad = grad
        for group, rate in zip(optimizer.param_groups, rates):
            falling = rate * (1 + math.cos(math.pi * step / iters)) / 2
            group["lr"] = falling if group["cosine"] else rate
        optimizer.step()
        for parameter in parameters:
            if id(parameter) in scales:
                parameter.data.clamp_(min=SMALLEST)


def batch_loss(lesson: Lesson, norm: float) -> torch.Tensor:
    """Returns the loss of one batch that is drawn for it, without penalties; of several workers
    each one's part, which add up to it."""
    unit, rows = lesson.unit, draw_rows(lesson)
    unit.share = share_of(len(rows))
    try:
        return unit.share.weight * _loss_of(lesson, unit.share.of(rows), norm)
    finally:
        unit.share = None


def _loss_of(lesson, rows, norm):
    unit, target, layer_weight = lesson.unit, lesson.target, lesson.objective.layer_weight
    half = lesson.schedule.dtype == "bf16"
    with torch.autocast(unit.device.type, torch.bfloat16, enabled=half):
        if not layer_weight:
            return output_loss(unit, unit(lesson.inputs, rows), target, rows, norm)
        names = comparable(unit.module)
        with torch.no_grad(), outputs_of(unit.original, names) as wanted:
            unit.call(unit.original, unit.float_inputs, rows)
        with outputs_of(unit.module, names) as found:
            out = unit(lesson.inputs, rows)
        inner = sum(lp(found[name].float(), wanted[name].float(), norm) for name in names)
        return output_loss(unit, out, target, rows, norm) + layer_weight * inner


def draw_rows(lesson: Lesson) -> torch.Tensor:
    """Draws the samples of one batch: any; or, with `active` or `visit_cost`, all of the time
    segment that is undecided or seldom visited most (APQ-DM, active timestep selection: the paper's
    second term, its released code's third), argmax_t entropy(t) + active / (visits(t) + 1) -
    visit_cost visits(t)."""
    unit, schedule, generator = lesson.unit, lesson.schedule, lesson.generator
    if not (schedule.active or schedule.visit_cost):
        return torch.randint(len(lesson.target), (schedule.batch_size,), generator=generator)
    soft = _soft_scales(input_quantizers(unit.module).values())
    score = sum(m.entropy().detach().cpu() for m in soft) / max(len(soft), 1)
    score = score + schedule.active / (unit.visits + 1) - schedule.visit_cost * unit.visits
    empty = torch.bincount(unit.segments, minlength=len(score)) == 0
    score[empty] = -torch.inf
    segment = int(score.argmax())
    unit.visits[segment] += 1
    rows = (unit.segments == segment).nonzero()[:, 0]
    return rows[torch.randint(len(rows), (schedule.batch_size,), generator=generator)]

"""Block reconstruction (BRECQ, Li et al. 2021, arXiv:2102.05426; Q-Diffusion, Li et al. 2023,
arXiv:2302.04304).

Unit by unit in execution order. In two phases: learn the rounding of the weights so that the unit,
fed by the network quantized so far (activations in full precision), gives the full-precision
output, with a penalty of rounding whose beta falls after a warm-up without it; then, with hard
weights, the activation scales (LSQ) from full-precision inputs to full-precision outputs.
Or jointly (QDrop, Wei et al. 2022, arXiv:2203.05740): rounding and scales at once, fed by the
network with quantized weights and activations, elements of whose output are replaced by
full-precision ones at random. quant/reconstruction/learn.py has the losses."""

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from base.devices import return_memory
from base.seeds import mix
from base.workers import align
from quant.network import input_quantizers, quant_layers, set_input_quantization
from quant.passes.declare import Moment, Plan, quant_pass, with_fields
from quant.passes.find import declaration_of
from quant.passes.job import Facts, Job
from quant.reconstruction.budget import capture_of
from quant.reconstruction.capture import Stream
from quant.reconstruction.estimate import Estimate, expected_seconds
from quant.reconstruction.frequency import FrequencyFilter
from quant.reconstruction.learn import (
    Lesson,
    change_of_error,
    learn_jointly,
    learn_rounding,
    learn_scales,
    measured,
)
from quant.reconstruction.saliency import Saliency
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.store import Store
from quant.reconstruction.unit import Unit, load_unit, mixed, save_unit


def _check(plan: Plan) -> None:
    if plan.options.get("active") and "group_scales" not in plan.names:
        raise ValueError(
            "the active choice of batches goes by how undecided group_scales is, which this "
            "method lacks; list it before reconstruct, or leave out active"
        )


def _idle(options: dict[str, Any], names: list[str]) -> set[str]:
    """Those of a phase that is left out; and the rate of free scales where a pass has put functions
    in their place, which learn at soft_lr."""
    modelled = any(declaration_of(name).moment is Moment.MODEL for name in names)
    idle = {"input_iters"} if options.get("joint") else set()
    idle |= {"weight_lr"} if options.get("weight_iters") == 0 else set()
    return idle | ({"input_lr"} if modelled or options.get("input_iters") == 0 else set())


def _sampled(job, num_samples):
    """The job with as many samples to learn from, drawn so that every time segment keeps some."""
    if num_samples is None:
        return job
    subset = job.calibration.subset(num_samples, job.net.timeline, job.seed)
    return replace(job, calibration=subset)


def _begin(job: Job, options: dict[str, Any]) -> None:
    """Refuses what memory and disk do not hold."""
    capture_of(_sampled(job, options.get("num_samples")))


KEYS = "weight_iters input_iters weight_lr input_lr batch_size dtype num_samples gptq".split()
EFFORT = {key: key for key in KEYS}


@quant_pass(
    moment=Moment.LEARN, one_network=True, effort=EFFORT, idle=_idle, check=_check, begin=_begin
)
@with_fields
def reconstruct(job: Job, *, objective: Objective, schedule: Schedule) -> Facts:
    """The pass. Counts are optimizer steps per unit, `warmup` a fraction of them; with
    `dtype: bf16` the steps are computed under autocast. `num_samples` of the calibration set are
    learned from. Captured activations beyond
    `job.memory_gb` spill to disk; what gives way where `job.disk_gb` does not hold them says
    quant/reconstruction/budget.py.

    Rates of scales fall to 0 along a cosine, that of the rounding only with `weight_cosine`.
    `joint` learns both at once in `weight_iters` steps, each activation unquantized with
    probability `drop`. With `gptq` the rounding begins halfway between the weight and second-order
    codes (quant/reconstruction/gptq.py), else at the weight. `layer_weight` adds the error of a
    block's inner layers. `saliency` in [0, 1] is the share of the error's weights that follows
    received attention (quant/reconstruction/saliency.py); `frequency` in [0, 1] how far it is
    weighed by what errors of each spatial frequency do to the image
    (quant/reconstruction/frequency.py). `smooth` holds the scales of neighbouring time segments
    together. `active` or `visit_cost` > 0 takes the batches from the segment that needs them most
    (quant/reconstruction/learn.py). `soft_lr` is the rate of what gives scales while they are
    learned (dynamic_scales, group_scales).

    Each finished unit is saved in `job.resume_folder`; a run that is killed and started again ends
    in the same bytes. Several workers (base/workers.py) learn each unit together. Returns one fact
    per unit and phase: error before and after (relative to the mean square of the target),
    seconds."""
    job.need_ranges("reconstruct")
    job = _sampled(job, schedule.num_samples)
    calibration, timeline, batch_size = job.calibration, job.net.timeline, job.batch(64)
    capture, names = capture_of(job), job.graph.units
    if not capture.exact:
        job.log(str(capture))
    store = Store(job.memory_gb, job.resume_folder, capture.dtype)
    options = {"batch_size": batch_size, "store": store, "keep": capture.keep}
    original, quantized = (
        Stream(net, job.graph, calibration, **options) for net in (job.model.net, job.net)
    )
    saliency = filters = None
    if objective.saliency:
        saliency = Saliency(job.model.net, calibration, objective.saliency, batch_size)
    if objective.frequency:
        filters = FrequencyFilter(job, names, objective.frequency)
    segments = timeline.segments_of(calibration.t)

    def set_time(rows):
        timeline.set_time(calibration.t[rows].to(job.device))

    set_input_quantization(job.net, schedule.joint)
    estimate = Estimate(expected_seconds(job, objective, schedule, capture.passes))
    facts = [] if capture.exact else [{"pass": "reconstruct", "capture": str(capture)}]
    for i, name in enumerate(names):
        started = time.monotonic()
        path = job.resume_folder / f"{i:03d}_{name}.safetensors"
        unit = Unit(name, quantized.modules[name], quantized.device, set_time, batch_size)
        unit.original, unit.saliency = original.modules[name], saliency
        unit.segments, unit.visits = segments, torch.zeros(timeline.num_segments)
        if filters:
            unit.frequency = lambda rows, error: filters(name, calibration.t[rows], error)
        unit.float_inputs, quant_inputs = original.inputs(name), quantized.inputs(name)
        target = original.advance(name, unit.float_inputs)
        new = saved = load_unit(unit.module, path)
        if saved is None:
            generator = torch.Generator().manual_seed(mix(job.seed, i))
            new = _learn_unit(Lesson(unit, quant_inputs, target, generator, objective, schedule))
            align(unit.module)
            save_unit(unit.module, path, new)
        original.free(unit.float_inputs)
        del unit, target
        quantized.advance(name, quant_inputs)
        quantized.free(quant_inputs)
        del quant_inputs
        return_memory()
        facts += new
        estimate.finished(name, time.monotonic() - started if saved is None else None)
        changes = "  ".join(map(change_of_error, new))
        job.log(f"[{i + 1}/{len(names)}] {name:20} {changes}  about {estimate.left:.0f} s left")
        job.note(facts)
    set_input_quantization(job.net, True)
    return facts


def _learn_unit(lesson):
    """Learns the unit of a lesson whose inputs are those of the quantized network; it ends
    hardened. Returns its facts. Layers that are hard already stay as they are."""
    unit = lesson.unit
    layers = [m for m in quant_layers(unit.module).values() if m.weight_quantizer is not None]
    layers = [m for m in layers if m.weight_int is None]
    quantizers = list(input_quantizers(unit.module).values())
    if lesson.schedule.joint:
        if not layers and not quantizers:
            return []
        inputs = mixed(lesson.inputs, unit.float_inputs, lesson.generator, unit)
        learn = partial(learn_jointly, replace(lesson, inputs=inputs), layers, quantizers)
        return [measured("reconstruct", "joint", lesson, learn)]
    facts = []
    if layers:
        learn = partial(learn_rounding, lesson, layers)
        facts.append(measured("reconstruct", "weight", lesson, learn))
    if quantizers:
        lesson = replace(lesson, inputs=unit.float_inputs)
        set_input_quantization(unit.module, True)
        learn = partial(learn_scales, lesson, quantizers)
        facts.append(measured("reconstruct", "input", lesson, learn))
        set_input_quantization(unit.module, False)
    return facts

"""Steps of a unit tried on the side, for what they cost: time depends on shapes alone, so that one
sample over and over, and scales of 1 where none are fitted yet, will do."""

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from quant.graph import Graph
from quant.network import QuantizedNet, input_quantizers, quant_layers, set_input_quantization
from quant.quantizer import Quantizer
from quant.reconstruction.learn import Lesson, learn_jointly, learn_rounding, learn_scales
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.unit import Unit

ROUNDS = 3  # of a comparison
STEPS = 3  # of a phase in a round; the first also makes what the others use
LEARN = {
    "weight": lambda lesson, layers, quantizers: learn_rounding(lesson, layers),
    "input": lambda lesson, layers, quantizers: learn_scales(lesson, quantizers),
    "joint": learn_jointly,
}


def phases_of(module: nn.Module, schedule: Schedule) -> dict[str, int]:
    """Steps of each phase in which `reconstruct` learns a unit of a quantized network."""
    layers, quantizers = _learned(module)
    if schedule.joint:
        return {"joint": schedule.weight_iters} if layers or quantizers else {}
    weight = {"weight": schedule.weight_iters} if layers else {}
    return weight | ({"input": schedule.input_iters} if quantizers else {})


def _learned(module):
    layers = [m for m in quant_layers(module).values() if m.weight_quantizer is not None]
    layers = [m for m in layers if m.weight_int is None]
    return layers, list(input_quantizers(module).values())


@dataclass
class Trial:
    """A unit to be tried, which stays as it is: `name` in the quantized network `net`, `original`
    in full precision, what it is called with for one sample (1, ...), the times (N,) of the samples
    that batches are made of, and the clock to go by."""

    net: QuantizedNet
    name: str
    original: nn.Module
    arguments: Sequence[torch.Tensor]
    times: torch.Tensor
    clock: Callable[[], float] = time.perf_counter

    def phases(self, schedule: Schedule) -> dict[str, int]:
        """Steps of each phase."""
        return phases_of(self.net.get_submodule(self.name), schedule)

    def seconds(
        self, phase: str, objective: Objective, schedule: Schedule, steps: int = STEPS
    ) -> float:
        """Measures some steps of a phase, with what they begin and end with. Saliency and
        frequencies, which the whole network gives, are left out."""
        objective = replace(objective, saliency=0.0, frequency=0.0)
        few = {"weight_iters": steps, "input_iters": steps, "warmup": 0.0, "gptq": False}
        unit = self._unit()
        with torch.no_grad():
            target = self.original(*(a.to(unit.device) for a in self.arguments))
        target = target.expand(len(self.times), *target.shape[1:])
        generator, schedule = torch.Generator().manual_seed(0), replace(schedule, **few)
        lesson = Lesson(unit, unit.float_inputs, target, generator, objective, schedule)
        layers, quantizers = _learned(unit.module)
        if phase == "input":
            for layer in layers:
                layer.harden()
        set_input_quantization(unit.module, phase != "weight")
        return timed(lambda: LEARN[phase](lesson, layers, quantizers), unit.device, self.clock)

    def seconds_of_passing(self, batch_size: int, quantize_inputs: bool) -> tuple[float, float]:
        """Measures a forward pass of a batch through the original and the quantized unit, its
        weights as they are after learning."""
        unit, rows = self._unit(), torch.arange(batch_size) % len(self.times)
        for layer in _learned(unit.module)[0]:
            layer.harden()
        set_input_quantization(unit.module, quantize_inputs)
        found = []
        for module in (self.original, unit.module):
            call = torch.no_grad()(partial(unit.call, module, unit.float_inputs, rows))
            call()
            found.append(timed(call, unit.device, self.clock))
        return tuple(found)

    def _unit(self):
        """A copy of the unit, at the network's own timeline."""
        timeline, module = self.net.timeline, self.net.get_submodule(self.name)
        module = copy.deepcopy(module, {id(timeline): timeline})
        for q in module.modules():
            if isinstance(q, Quantizer) and not q.is_fitted:
                q.scale.data.fill_(1.0)
                q.zero_point.fill_(0.0)
        device = next(self.net.parameters()).device

        def set_time(rows):
            timeline.set_time(self.times[rows].to(device))

        unit = Unit(self.name, module, device, set_time)
        unit.original, unit.segments = self.original, timeline.segments_of(self.times)
        unit.visits = torch.zeros(timeline.num_segments)
        unit.float_inputs = [a.expand(len(self.times), *a.shape[1:]) for a in self.arguments]
        return unit


def first_large(graph: Graph) -> str:
    """The first unit with as many multiply-adds as the average one."""
    work = graph.work
    return next(name for name in work if work[name] * len(work) >= sum(work.values()))


def processor_seconds() -> float:
    """A clock of the work that the processor does for this process, per thread, which what else
    runs on the machine hardly changes."""
    return time.process_time() / torch.get_num_threads()


def timed(
    call: Callable[[], Any], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds of a call, with what it leaves a GPU to do."""
    started = clock()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started


def seconds_by_dtype(trial: Trial, objective: Objective, schedule: Schedule) -> dict[str, float]:
    """Measures an average step of a unit's phases in each data type, in turn: the median of
    ROUNDS rounds. A first round, which is not counted, makes what later ones use."""
    phases = {phase: steps for phase, steps in trial.phases(schedule).items() if steps}
    found = {"fp32": [], "bf16": []}
    for _ in range(1 + ROUNDS):
        for dtype, rounds in found.items():
            typed = replace(schedule, dtype=dtype)
            each = {phase: trial.seconds(phase, objective, typed) for phase in phases}
            rounds.append(sum(phases[phase] * each[phase] for phase in phases) / STEPS)
    total = max(1, sum(phases.values()))
    return {dtype: statistics.median(rounds[1:]) / total for dtype, rounds in found.items()}

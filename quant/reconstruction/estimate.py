"""How long reconstruction takes, before it has and while it does.

The seconds of a unit are linear in its work: multiply-adds and values that its layers read, both
times the samples of a batch; weights; layers. What each costs is measured on the side, by a few
steps of the units that have the most of one of these and of the one that has the least (trial.py),
and once units are finished corrected by what these took."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from quant.graph import Graph
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import Trial, phases_of
from quant.reconstruction.unit import ERROR_ROWS

STEPS = 2  # of a phase that are measured, after one that is not
FEW_STEPS = 20
PER_MULTIPLY_ADD = 1e-9  # seconds, until units have told
PRIOR = 0.05  # share of the whole that measured units weigh, beside finished ones

Work = tuple[float, float, float, float]  # macs and values of a sample, weights, layers


def work_of(net: nn.Module, graph: Graph) -> dict[str, Work]:
    """The work of every unit of a float network."""
    layers = graph.by_unit(dict.fromkeys(graph.macs, 1))
    values, found = graph.by_unit(graph.operands), {}
    for name, macs in graph.work.items():
        weights = sum(p.numel() for p in net.get_submodule(name).parameters())
        found[name] = float(macs), float(values[name]), float(weights), float(layers[name])
    return found


def chosen(work: Mapping[str, Work]) -> list[str]:
    """The units to be measured: those with the most of anything, and the one with the fewest
    multiply-adds."""
    most = {max(work, key=lambda name, i=i: work[name][i]) for i in range(3)}
    return [name for name in work if name in most | {min(work, key=lambda n: work[n][0])}]


class Costs:
    """What each kind of work costs, from the seconds of some units for batches of `batch_size`: the
    combination of no negative costs whose relative errors are least."""

    def __init__(self, work: Sequence[Work], seconds: Sequence[float], batch_size: int):
        from scipy.optimize import nnls  # takes a while to import

        rows = _of_batch(work, batch_size) / np.array(seconds)[:, None]
        scale = rows.max(0).clip(min=1e-30)  # costs differ by nine orders of magnitude
        self.each = nnls(rows / scale, np.ones(len(rows)))[0] / scale

    def of(self, work: Work, batch_size: int) -> float:
        """Seconds of a unit for a batch."""
        return float(_of_batch(work, batch_size) @ self.each)


def _of_batch(work, batch_size):
    """Weights and layers are there once for all samples."""
    return np.array(work) * np.array([batch_size, batch_size, 1, 1])


@dataclass
class Rates:
    """Measured costs: of a step in each phase, and of a forward pass through the original and the
    quantized network; how many samples learning and passing take at once."""

    steps: dict[str, Costs]
    original: Costs
    quantized: Costs
    step_size: int
    batch_size: int

    def seconds(
        self, work: Work, phases: Mapping[str, int], samples: int, passes: float = 0.0
    ) -> dict[str, float]:
        """Seconds of a unit that takes these steps in each phase: capture of `samples` samples,
        errors, learning. `passes` are further forward passes of both networks."""
        original, quantized = (
            cost.of(work, self.batch_size) / self.batch_size
            for cost in (self.original, self.quantized)
        )
        return {
            "capture": (1 + passes / 2) * samples * (original + quantized),
            "errors": 2 * len(phases) * min(ERROR_ROWS, samples) * quantized,
            "learning": sum(n * self.steps[p].of(work, self.step_size) for p, n in phases.items()),
        }


def measured_rates(
    trials: Mapping[str, Trial],
    work: Mapping[str, Work],
    objective: Objective,
    schedule: Schedule,
    batch_size: int,
    at_most: int | None = None,
) -> Rates:
    """Measures the units of `trials` with batches as in `schedule` and, where they pass through the
    network, of `batch_size`; or of `at_most` so many."""
    steps, passing, sizes = {}, [], (schedule.batch_size, batch_size)
    step_size, pass_size = (min(size, at_most or size) for size in sizes)
    schedule = replace(schedule, batch_size=step_size)
    for name, trial in trials.items():
        for phase in trial.phases(schedule):
            trial.seconds(phase, objective, schedule, 1)
            seconds = trial.seconds(phase, objective, schedule, STEPS) / STEPS
            steps.setdefault(phase, []).append((work[name], seconds))
        passing.append(trial.seconds_of_passing(pass_size, schedule.joint))
    costs = {phase: Costs(*zip(*found), step_size) for phase, found in steps.items()}
    tried = [work[name] for name in trials]
    original, quantized = (Costs(tried, seconds, pass_size) for seconds in zip(*passing))
    return Rates(costs, original, quantized, *sizes)


def expected_seconds(
    job: Any, objective: Objective, schedule: Schedule, passes: float
) -> dict[str, float]:
    """Measures what each unit of a Job (quant/passes/job.py) with fitted ranges is going to take:
    name -> seconds. `passes` are further forward passes that its capture takes. Of units that take
    fewer steps than measuring does, the shares alone: by multiply-adds."""
    net, data, work = job.model.net, job.calibration, work_of(job.model.net, job.graph)
    phases = {n: phases_of(job.net.get_submodule(n), schedule) for n in job.graph.units}
    if all(sum(own.values()) < FEW_STEPS for own in phases.values()):
        return {name: work[name][0] * PER_MULTIPLY_ADD for name in phases}
    names = chosen({n: work[n] for n in phases if phases[n]} or work)
    for phase in dict.fromkeys(phase for own in phases.values() for phase in own):
        if not any(phase in phases[n] for n in names):
            names.append(next(n for n in phases if phase in phases[n]))
    arguments = inputs_of(net, names, data.rows(slice(0, 1)), 1, whole=True)
    trials = {n: Trial(job.net, n, net.get_submodule(n), arguments[n], data.t) for n in names}
    rates = measured_rates(trials, work, objective, schedule, job.batch(64))
    return {
        name: sum(rates.seconds(work[name], phases[name], len(data), passes).values())
        for name in phases
    }


class Estimate:
    """What is left of units, from what each is `expected` to take and finished ones took."""

    def __init__(self, expected: Mapping[str, float]):
        self.expected = dict(expected)
        self.took = self.foreseen = PRIOR * sum(expected.values())

    def finished(self, name: str, seconds: float | None) -> None:
        """Tells what a unit took; None for one that was there already."""
        foreseen = self.expected.pop(name)
        if seconds is not None:
            self.took, self.foreseen = self.took + seconds, self.foreseen + foreseen

    @property
    def left(self) -> float:
        """Seconds that the others are going to take."""
        return sum(self.expected.values()) * self.took / max(self.foreseen, 1e-9)

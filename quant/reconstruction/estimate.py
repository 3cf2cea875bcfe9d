"""How long reconstruction takes, before it has and while it does.

The seconds of a unit are linear in its work: multiply-adds and values that its layers read, both
times the samples of a batch; weights; layers. What each costs is measured on the side, by a few
steps of the units that have the most of one of these and of the one that has the least (trial.py),
and once units are finished corrected by what these took."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from quant.graph import Graph
from quant.network import quant_layers
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.gptq import POSITIONS, SAMPLES, optimal_codes
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import Trial, phases_of, timed
from quant.reconstruction.unit import ERROR_ROWS

STEPS = 2  # of a phase that are measured, after one that is not
FEW_STEPS = 20
PER_MULTIPLY_ADD = 1e-9  # seconds, until units have told
# of second-order codes: what collecting inputs is worth in forward passes, and what factors of a
# matrix are worth in its cubes
COLLECTED, CUBES = 3, 6
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
    begin: "Beginning | None" = None  # of learning from second-order codes

    def seconds(
        self,
        work: Work,
        phases: Mapping[str, int],
        samples: int,
        passes: float = 0.0,
        columns: Sequence[int] = (),
    ) -> dict[str, float]:
        """Seconds of a unit that takes these steps in each phase: capture of `samples` samples,
        errors, learning. `passes` are further forward passes of both networks, `columns` those of
        the weights that are learned."""
        original, quantized = (
            cost.of(work, self.batch_size) / self.batch_size
            for cost in (self.original, self.quantized)
        )
        learning = sum(n * self.steps[p].of(work, self.step_size) for p, n in phases.items())
        if self.begin and columns:
            learning += self.begin.of(columns) + COLLECTED * min(SAMPLES, samples) * quantized
        return {
            "capture": (1 + passes / 2) * samples * (original + quantized),
            "errors": 2 * len(phases) * min(ERROR_ROWS, samples) * quantized,
            "learning": learning,
        }


class Beginning:
    """What second-order codes of a weight take (gptq.py): the matrix of its inputs grows as the
    square of its columns, its inverse as the cube, and each column is a round of small operations.
    Measured on weights of two sizes."""

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter):
        found = [self._measure(columns, device, clock) for columns in (64, 512, 512)]
        self.each = max(found[0], 0.0) / 64
        self.rate = max(found[-1] - 512 * self.each, 0.0) / self._macs(512)

    def of(self, columns: Iterable[int]) -> float:
        """Seconds of weights with so many columns each."""
        return sum(self.rate * self._macs(m) + self.each * m for m in columns)

    def _macs(self, columns):
        return POSITIONS * columns**2 + CUBES * columns**3

    def _measure(self, columns, device, clock):
        x = torch.randn(POSITIONS, columns, device=device)
        weight = torch.randn(64, columns, device=device)
        low, high = torch.full_like(weight, -8.0), torch.full_like(weight, 7.0)

        def run():
            optimal_codes(weight, torch.full_like(weight, 0.3), low, high, x.T @ x / len(x))

        return timed(run, device, clock)


def columns_of(module: nn.Module) -> list[int]:
    """Columns of the weights of a unit that are to be learned."""
    layers = [m for m in quant_layers(module).values() if m.weight_quantizer is not None]
    return [m.weight[0].numel() for m in layers if m.weight_int is None]


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
    device = next(next(iter(trials.values())).net.parameters()).device
    begin = Beginning(device) if schedule.gptq and schedule.weight_iters else None
    return Rates(costs, original, quantized, *sizes, begin)


def tried(work: Mapping[str, Work], phases: Mapping[str, Mapping[str, int]]) -> list[str]:
    """The units to be measured: `chosen` of those that are learned, and one for every phase."""
    names = chosen({n: work[n] for n in work if phases[n]} or work)
    for phase in dict.fromkeys(phase for own in phases.values() for phase in own):
        if not any(phase in phases[n] for n in names):
            names.append(next(n for n in phases if phase in phases[n]))
    return names


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
    names = tried(work, phases)
    arguments = inputs_of(net, names, data.rows(slice(0, 1)), 1, whole=True)
    trials = {n: Trial(job.net, n, net.get_submodule(n), arguments[n], data.t) for n in names}
    rates = measured_rates(trials, work, objective, schedule, job.batch(64))
    columns = {n: columns_of(job.net.get_submodule(n)) for n in phases}
    return {
        n: sum(rates.seconds(work[n], phases[n], len(data), passes, columns[n]).values())
        for n in phases
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

"""What a run is going to take, before it begins and without weights: seconds and memory, from the
shapes of the network and from rates that are measured on this machine, on units with random
weights."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.devices import computes_bfloat16, exact_arithmetic, resolve_device
from base.hooks import watching
from ddim.sampler import num_evaluations
from ddim.schedule import make_schedule
from models.diffusion import example_arguments
from quant.convert import convert
from quant.graph import Graph
from quant.network import input_quantizers, quant_layers
from quant.observer import VALUES_PER_GROUP, fit_scales
from quant.reconstruction.estimate import columns_of, measured_rates, tried, work_of
from quant.reconstruction.frequency import NUM_IMAGES
from quant.reconstruction.trial import Trial, first_large, phases_of, seconds_by_dtype, timed
from quant.timeline import Timeline
from tinydm.arithmetic import all_of, learning_of, quicker, settings_of
from tinydm.recipe import RunConfig, boundaries, network_times

MACS = 10**9  # of a batch that is measured, at most, unless it is of one sample
BACKWARD = 2  # forward passes that a backward one is worth
FITTED = 256  # samples that ranges are fitted to
STEP_HOLDS = 10  # float32 numbers for every value that a layer reads
PASS_HOLDS = 4


@dataclass
class Forecast:
    """Seconds of every stage and pass that is counted, in turn; names of passes that are not; the
    most bytes in memory beside captured activations."""

    seconds: dict[str, float]
    uncounted: list[str]
    memory: int

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {spoken(seconds)}" for name, seconds in self.seconds.items())
        text = f"time: about {spoken(sum(self.seconds.values()))} ({parts}"
        return text + "".join(f", {name} not counted" for name in self.uncounted) + ")"


def spoken(seconds: float) -> str:
    """Says a time in seconds, minutes or hours."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def forecast(
    config: RunConfig, net: nn.Module, graph: Graph, samples: int, again: float
) -> Forecast:
    """Foretells calibrate and quantize by a recipe: `net` is the float network on the meta device,
    which is given memory here, `samples` those of the calibration set, `again` the forward passes
    that its capture takes more. Captured activations are left out of memory."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with exact_arithmetic(config.threads):
        bench = Bench(config, net, graph, samples, again)
        seconds, uncounted = {"calibrate": bench.calibrate()}, []
        for name, options in all_of(config.all_passes):
            if name in COUNTED:
                seconds[name] = seconds.get(name, 0.0) + COUNTED[name](bench, options)
            elif name != "segment_models":  # what is inside is counted
                uncounted.append(name)
    return Forecast(seconds, uncounted, resident + bench.memory())


class Bench:
    """The network of a recipe, some of its units with weights, and what these take here."""

    def __init__(
        self, config: RunConfig, net: nn.Module, graph: Graph, samples: int, again: float
    ) -> None:
        self.config, self.graph, self.samples, self.again = config, graph, samples, again
        self.work = work_of(net, graph)
        names = [name for name, _ in all_of(config.all_passes)]
        segments = len(boundaries(config)) + 1
        # networks that are learned one by one, each from its share of the samples
        self.copies = segments if "segment_models" in names else 1
        self.segments = segments // self.copies
        timeline = Timeline([] if self.copies > 1 else boundaries(config))
        schedule = settings_of(learning_of(config.all_passes))[1]
        shapes = convert(net, config.all_rules, timeline)
        phases = {n: phases_of(shapes.get_submodule(n), schedule) for n in graph.units}
        units = dict.fromkeys([first_large(graph), *tried(self.work, phases)])
        arguments = _arguments(net, example_arguments(asdict(config), net), units)
        net = _with_memory(net, units, resolve_device(config.device))
        self.bytes = sum(p.numel() * p.element_size() for p in net.parameters())
        self.net = convert(net, config.all_rules, timeline)
        t = torch.tensor(network_times(config))[torch.arange(samples) % len(network_times(config))]
        self.trials = {
            name: Trial(self.net, name, net.get_submodule(name), arguments[name], t)
            for name in units
        }
        self.objective, self.schedule = self._settings()
        most = max(macs for macs, *_ in self.work.values())
        batch, few = min(64, config.max_batch), max(1, int(MACS / most))
        measured = self.trials, self.work, self.objective, self.schedule, batch, few
        self.rates = measured_rates(*measured)

    def _settings(self):
        """With the data type that would be chosen here."""
        learning = learning_of(self.config.all_passes)
        objective, schedule = settings_of(learning)
        device = next(self.net.parameters()).device
        if self.config.effort.dtype == "auto" and learning and computes_bfloat16(device):
            trial = self.trials[first_large(self.graph)]
            few = replace(schedule, batch_size=min(4, schedule.batch_size))
            schedule = replace(schedule, dtype=quicker(seconds_by_dtype(trial, objective, few)))
        return objective, schedule

    def passing(self, cost: Any, samples: int) -> float:
        """Seconds of a forward pass of samples through the original or quantized network."""
        size = self.rates.batch_size
        return samples / size * sum(cost.of(work, size) for work in self.work.values())

    def calibrate(self) -> float:
        """Seconds of the trajectories, in whole batches, twice where they begin in samples."""
        c, sampling = self.config.calibration, self.config.sampling
        if c.file:
            return 0.0
        steps = sampling.sequence(make_schedule(**self.config.schedule))
        taken = steps[: max(1, round(c.start_step * len(steps)))]
        count = num_evaluations(sampling.sampler, taken)
        count += num_evaluations(sampling.sampler, steps) if c.start == "di2n" else 0
        images = -(-c.images // sampling.batch_size) * sampling.batch_size
        guided = 2 if self.config.guidance.scale != 1 else 1
        return self.passing(self.rates.original, images * count * guided)

    def fit_ranges(self, options: dict[str, Any]) -> float:
        """Seconds of observing, and of all searches, by those of the units that are tried."""
        weights = values = quantizers = 0.0
        seconds = [0.0, 0.0]
        for name in self.trials:
            module = self.net.get_submodule(name)
            device = next(self.net.parameters()).device
            for layer in quant_layers(module).values():
                if layer.weight_quantizer is not None and not layer.has_segments:
                    seconds[0] += timed(layer.fit_weight, device)
                    weights += layer.weight.numel()
            for q in input_quantizers(module).values():
                count = options.get("num_values", VALUES_PER_GROUP) // self.segments
                values = torch.randn(q.scale.shape[1], count)
                fit = lambda q=q, values=values: fit_scales(q, [values.to(device)])  # noqa: E731
                seconds[1] += timed(fit, device) * self.segments
                quantizers += 1
        whole = sum(m.weight.numel() for m in quant_layers(self.net).values())
        share = whole / max(weights, 1), len(input_quantizers(self.net)) / max(quantizers, 1)
        each = self.samples // self.copies
        samples = min(options.get("num_samples", FITTED) or each, each)
        observed = self.passing(self.rates.original, samples)
        return self.copies * (observed + seconds[0] * share[0] + seconds[1] * share[1])

    def reconstruct(self, options: dict[str, Any]) -> float:
        """Seconds of all units, and of the maps that weigh errors."""
        samples, total = options.get("num_samples") or self.samples, 0.0
        samples = min(samples, self.samples // self.copies)
        if self.objective.saliency:
            total += self.passing(self.rates.original, samples)
        if self.objective.frequency:
            steps = self.config.sampling.num_evaluations(make_schedule(**self.config.schedule))
            # a checkpoint of every step: forward twice
            total += (2 + BACKWARD) * self.passing(self.rates.original, NUM_IMAGES * steps)
        for name, work in self.work.items():
            module = self.net.get_submodule(name)
            how = phases_of(module, self.schedule), samples, self.again, columns_of(module)
            total += sum(self.rates.seconds(work, *how).values())
        return self.copies * total

    def finetune(self, options: dict[str, Any]) -> float:
        """Seconds of its steps, through the whole network, and of its error before and after."""
        original, quantized = (
            self.passing(cost, 1) for cost in (self.rates.original, self.rates.quantized)
        )
        step = options["batch_size"] * (original + (1 + BACKWARD) * quantized)
        return options["iters"] * step + 2 * FITTED * (original + quantized)

    def memory(self) -> int:
        """Bytes of both networks and of the largest step or forward pass."""
        values = self.graph.by_unit(self.graph.operands).values()
        names = [name for name, _ in all_of(self.config.all_passes)]
        at_once = sum(values) if "finetune" in names else max(values)
        step = self.schedule.batch_size * at_once * STEP_HOLDS
        return 2 * self.bytes + 4 * max(step, self.rates.batch_size * max(values) * PASS_HOLDS)


# pass -> its seconds by (bench, options)
COUNTED: dict[str, Callable[[Bench, dict[str, Any]], float]] = {
    "fit_ranges": Bench.fit_ranges,
    "reconstruct": Bench.reconstruct,
    "finetune": Bench.finetune,
}


@torch.no_grad()
def _arguments(net, example, units):
    """Random arguments (1, ...) of units of a network on the meta device."""
    found = {}

    def note(name, _, inputs):
        found[name] = [
            torch.randn(a.shape) if a.is_floating_point() else torch.zeros(a.shape, dtype=a.dtype)
            for a in inputs
        ]

    with watching(net, {n: lambda *call, n=n: note(n, *call) for n in units}, before=True):
        net(*(a.to("meta") for a in example))
    return found


@torch.no_grad()
def _with_memory(net, units, device):
    """The network on a device; memory of units that are not tried is never touched."""
    net = net.to_empty(device=device).requires_grad_(False).eval()
    for module in map(net.get_submodule, units):
        for p in module.parameters():
            nn.init.normal_(p, std=0.02)
        for b in module.buffers():
            b.zero_()
    return net

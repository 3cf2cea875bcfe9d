"""What a pass works on."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from base.workers import agreed
from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.graph import Graph
from quant.layers import QuantLayer
from quant.network import QuantizedNet, fit, input_quantizers, observing, quant_layers
from quant.observer import VALUES_PER_GROUP
from quant.quantizer import Quantizer
from quant.timeline import Timeline

Facts = list[dict[str, Any]]  # what a pass returns, a row for each thing that it did


class NoiseSchedule(Protocol):
    """What passes ask of the schedule of a model."""

    time_scale: float  # network time of one step

    def level(self, step: int) -> Any:
        """Returns abar of a step, a number."""


class Model(Protocol):
    """What passes ask of a model; any object with these will do."""

    net: nn.Module  # in full precision: eps of x (N, C, H, W) at the network times t (N,)
    shape: tuple[int, int, int]  # of one x: C, H, W
    schedule: NoiseSchedule

    def eps(self, x: torch.Tensor, t: torch.Tensor, cond: Any) -> torch.Tensor:
        """Returns what the sampler is told: the answer of `net`, guided and corrected."""

    def with_net(self, net: nn.Module) -> "Model":
        """Returns the same model around another network."""


@dataclass
class Job:
    """The float model, its quantized copy `net`, calibration data, the network's graph."""

    model: Model
    net: QuantizedNet
    calibration: CalibrationSet
    graph: Graph  # of the float network
    resume_folder: Path  # finished parts of the running pass
    rules: list[dict[str, Any]] = field(default_factory=list)  # of `net`; passes may add to them
    seed: int = 0
    max_batch: int = 256  # samples measured at once, which memory has to hold
    memory_gb: float = 4.0  # of captured activations; the rest spills to disk
    disk_gb: float | None = None  # of these; None: what is free, less a reserve
    log: Callable[[str], Any] = logging.getLogger("tinydm").info  # one line of progress
    note: Callable[[Facts], Any] = lambda facts: None  # facts so far of the running pass
    # (num_images, seed) -> x_0 (N, C, H, W), with gradients, of batch by batch
    differentiable: Callable[[int, int], Iterator[torch.Tensor]] | None = None
    # (num_images, seed) -> (step, t, x, cond, eps) of the float model, in turn
    trajectory: Callable[[int, int], Iterator[tuple]] | None = None

    def batch(self, usual: int) -> int:
        """Returns how many samples a pass measures at once: as usual, if so many are allowed."""
        return min(usual, self.max_batch)

    def add_rules(self, rules: list[dict[str, Any]], timeline: Timeline | None = None) -> None:
        """Converts the network again, by further rules and if need be on another timeline. Raises
        ValueError where an earlier pass has fitted or changed the network."""
        fitted = any(q.is_fitted for q in input_quantizers(self.net).values())
        if fitted or any(m.weight is not f.weight for m, f in self.layer_pairs()):
            raise ValueError(
                "a pass that adds rules begins with the network as it was; list it before the "
                "passes that balance, fit or reconstruct"
            )
        self.rules = [*self.rules, *agreed(rules)]
        timeline = timeline or Timeline(self.net.timeline.boundaries.tolist())
        self.net = convert(self.model.net, self.rules, timeline)

    @property
    def has_ranges(self) -> bool:
        """Whether every scale has been fitted."""
        return all(q.is_fitted for q in self.net.modules() if isinstance(q, Quantizer))

    def need_ranges(self, name: str) -> None:
        """Raises ValueError unless every scale is fitted, which the pass `name` begins with."""
        if not self.has_ranges:
            raise ValueError(f"{name} needs scales to begin with; list it after fit_ranges")

    def need_float_weights(self, name: str) -> None:
        """Raises ValueError where weights are integers already, for a pass that is too late."""
        if any(layer.weight_int is not None for layer in quant_layers(self.net).values()):
            raise ValueError(
                f"weights are integers already when {name} begins; list it before the passes that "
                "learn or harden them"
            )

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def fit_ranges(
        self,
        num_samples: int | None = 256,
        batch_size: int = 64,
        neighbours: int = 0,
        num_values: int = VALUES_PER_GROUP,
    ) -> None:
        """Chooses every scale and zero point, as the pass of this name says."""
        sample = self.calibration.subset(num_samples, self.net.timeline, self.seed)
        with torch.no_grad(), observing(self.net, len(sample), num_values):
            if input_quantizers(self.net):
                for arguments in sample.batches(self.batch(batch_size)):
                    self.net(*(a.to(self.device) for a in arguments))
        fit(self.net, neighbours=neighbours, batch_size=batch_size)

    def fitted_copy(self, rules: list[dict[str, Any]]) -> QuantizedNet:
        """Returns a copy of the network by these further rules, its ranges fitted, to measure."""
        copy = replace(self, net=convert(self.model.net, [*self.rules, *rules], self.net.timeline))
        copy.fit_ranges()
        return copy.net

    def layer_pairs(self) -> list[tuple[QuantLayer, nn.Module]]:
        """Returns quantized layers and their originals."""
        layers = quant_layers(self.net)
        return [(layer, self.model.net.get_submodule(name)) for name, layer in layers.items()]

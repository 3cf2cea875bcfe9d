"""What a pass works on."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.graph import Graph
from quant.network import input_quantizers, quant_layers
from quant.passes.fit_ranges import fit_ranges
from quant.quantizer import Quantizer
from quant.timeline import Timeline


@dataclass
class Job:
    """What a pass works on: the float model, its quantized copy `net`, calibration data, the
    network's graph."""

    model: Any  # anything with .net and .shape
    net: torch.nn.Module
    calibration: CalibrationSet
    graph: Graph  # of the float network
    resume_folder: Path  # finished parts of the running pass
    rules: list = ()  # that `net` was converted by; passes may add to them
    seed: int = 0
    max_batch: int = 256  # samples measured at once, which memory has to hold
    # captured activations held in memory; the rest spills to disk
    memory_gb: float = 4.0
    log: Callable = print  # one line of progress
    note: Callable = lambda facts: None  # facts so far of the running pass
    # (num_images, seed) -> x_0 (N, C, H, W), with gradients, of batch by batch
    differentiable: Callable = None
    # (num_images, seed) -> (step, t, x, cond, eps) of the float model, in turn
    trajectory: Callable = None

    def batch(self, usual):
        """Samples that a pass measures at once: as many as usual, if that many are allowed."""
        return min(usual, self.max_batch)

    def add_rules(self, rules, timeline=None):
        """Convert the network again, by further rules and if need be on another timeline: for
        passes that decide about widths or grids, which therefore come before all that fit or change
        the network."""
        if any(q.is_fitted for q in input_quantizers(self.net).values()) or any(
            m.weight is not f.weight for m, f in self.layer_pairs()
        ):
            raise ValueError(
                "a pass that adds rules begins with the network as it was; list it before the "
                "passes that "
                "balance, fit or reconstruct"
            )
        self.rules = [*self.rules, *rules]
        self.net = convert(
            self.model.net, self.rules, timeline or Timeline(self.net.timeline.boundaries.tolist())
        )

    @property
    def has_ranges(self):
        """Whether every scale has been fitted."""
        return all(q.is_fitted for q in self.net.modules() if isinstance(q, Quantizer))

    def need_ranges(self, name):
        """Raises ValueError unless every scale has been fitted, which the pass `name` begins
        with."""
        if not self.has_ranges:
            raise ValueError(f"{name} needs scales to begin with; list it after fit_ranges")

    def need_float_weights(self, name):
        """Raises ValueError where weights are integers already, which the pass `name` was to see
        before."""
        if any(layer.weight_int is not None for layer in quant_layers(self.net).values()):
            raise ValueError(
                f"weights are integers already when {name} begins; list it before the passes that "
                "learn "
                "or harden them"
            )

    @property
    def device(self):
        return next(self.net.parameters()).device

    def fitted_copy(self, rules):
        """A copy of the network with fitted ranges, by the own rules and these, for
        measurements."""
        copy = replace(self, net=convert(self.model.net, [*self.rules, *rules], self.net.timeline))
        fit_ranges(copy)
        return copy.net

    def layer_pairs(self):
        """Quantized layers and their originals."""
        return [
            (m, self.model.net.get_submodule(name)) for name, m in quant_layers(self.net).items()
        ]

"""Passes: functions (job, **options) -> facts, run in the order of the method's YAML."""
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch

from quant.calibration import CalibrationSet
from quant.config import unknown_word
from quant.convert import input_quantizers, quant_layers, set_input_quantization
from quant.graph import Graph
from quant.reconstruct import reconstruct


@dataclass
class Job:
    """What a pass works on: the float model, its quantized copy `net`, calibration data, the network's graph."""
    model: Any                             # anything with .net and .shape
    net: torch.nn.Module
    calibration: CalibrationSet
    graph: Graph                           # of the float network
    resume_folder: Path                    # finished parts of long passes
    seed: int = 0
    log: Callable = print                  # one line of progress
    note: Callable = lambda facts: None    # facts so far of the running pass


@torch.no_grad()
def fit_ranges(job, *, num_samples=256, batch_size=64):
    """Choose every scale and zero point: weights from the weights, activations from `num_samples` calibration samples
    through the full-precision network."""
    layers = [m for m in quant_layers(job.net).values() if m.weight_quantizer is not None]
    for layer in layers:
        layer.fit_weight()
        layer.weight_quantizer.enabled = False
    quantizers = input_quantizers(job.net).values()
    set_input_quantization(job.net, False)
    if quantizers:
        sample = job.calibration.subset(num_samples, job.seed)
        for q in quantizers:
            q.begin_observing(len(sample))
        device = next(job.net.parameters()).device
        for arguments in sample.batches(batch_size):
            job.net(*(a.to(device) for a in arguments))
        for q in quantizers:
            q.fit_observed()
    set_input_quantization(job.net, True)
    for layer in layers:
        layer.weight_quantizer.enabled = True
    return [{"pass": "fit_ranges", "weights": len(layers), "inputs": len(quantizers)}]


PASSES = {"fit_ranges": fit_ranges, "reconstruct": reconstruct}


def check_passes(passes):
    """Raises ValueError for an unknown pass or option; returns [(name, options)]."""
    checked = []
    for entry in passes:
        if isinstance(entry, dict) and len(entry) != 1:
            raise ValueError(f"pass entry {entry} must be one name with its options, for example {{fit_ranges: {{}}}}")
        (name, options), = entry.items() if isinstance(entry, dict) else ((entry, {}),)
        if name not in PASSES:
            raise ValueError(unknown_word(f"pass '{name}' is unknown", name, PASSES))
        known = [k for k in inspect.signature(PASSES[name]).parameters if k != "job"]
        for key in options or {}:
            if key not in known:
                raise ValueError(unknown_word(f"pass '{name}' has no option '{key}'", key, known))
        checked.append((name, options or {}))
    return checked


def run_passes(job, passes):
    """Run them in order, then harden what is still soft; returns all facts."""
    facts, write = [], job.note
    for name, options in check_passes(passes):
        job.note = lambda new: write(facts + new)
        facts += PASSES[name](job, **options)
        write(facts)
    for layer in quant_layers(job.net).values():
        layer.harden()
    return facts

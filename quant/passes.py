"""Passes: functions (job, **options) -> facts, run in the order of the method's YAML.

The YAML names a pass by its key in PASSES or, which needs no key here, as module.function: any function that Python can
import, so quant.shrink.shrink for the function shrink of a new quant/shrink.py. Such a module is imported only where
passes run, by scripts/quantize.py: to open, sample or score a run folder from elsewhere runs no code that it names;
before quantizing by a recipe from elsewhere, read its passes.
"""
import importlib
import inspect
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, get_args

import torch

from quant.calibration import CalibrationSet
from quant.config import Share, unknown_word
from quant.allocate import allocate_bits
from quant.apq import group_scales
from quant.balance import balance
from quant.bypass import bypass_input
from quant.convert import convert, in_full_precision, input_quantizers, quant_layers
from quant.correction import correct_noise
from quant.decide import decide_by_ranges
from quant.finetune import finetune
from quant.graph import Graph
from quant.order import check_order
from quant.quantizer import Quantizer
from quant.reconstruct import reconstruct
from quant.segments import segment_models
from quant.softmax import softmax_grid
from quant.stepbits import step_bits
from quant.tdq import dynamic_scales
from quant.temporal import reconstruct_temporal
from quant.timeline import Timeline


@dataclass
class Job:
    """What a pass works on: the float model, its quantized copy `net`, calibration data, the network's graph."""
    model: Any                             # anything with .net and .shape
    net: torch.nn.Module
    calibration: CalibrationSet
    graph: Graph                           # of the float network
    resume_folder: Path                    # finished parts of the running pass
    rules: list = ()                       # that `net` was converted by; passes may add to them
    seed: int = 0
    max_batch: int = 256                    # samples measured at once, which memory has to hold
    memory_gb: float = 4.0                 # captured activations held in memory; the rest spills to disk
    log: Callable = print                  # one line of progress
    note: Callable = lambda facts: None    # facts so far of the running pass
    differentiable: Callable = None        # (num_images, seed) -> x_0 (N, C, H, W), with gradients, of batch by batch
    trajectory: Callable = None            # (num_images, seed) -> (step, t, x, cond, eps) of the float model, in turn

    def batch(self, usual):
        """Samples that a pass measures at once: as many as usual, if that many are allowed."""
        return min(usual, self.max_batch)

    def add_rules(self, rules, timeline=None):
        """Convert the network again, by further rules and if need be on another timeline: for passes that decide about
        widths or grids, which therefore come before all that fit or change the network."""
        if any(q.is_fitted for q in input_quantizers(self.net).values()) or any(
                m.weight is not f.weight for m, f in self.layer_pairs()):
            raise ValueError("a pass that adds rules begins with the network as it was; list it before the passes that "
                             "balance, fit or reconstruct")
        self.rules = [*self.rules, *rules]
        self.net = convert(self.model.net, self.rules, timeline or Timeline(self.net.timeline.boundaries.tolist()))

    @property
    def has_ranges(self):
        """Whether every scale has been fitted."""
        return all(q.is_fitted for q in self.net.modules() if isinstance(q, Quantizer))

    def need_ranges(self, name):
        """Raises ValueError unless every scale has been fitted, which the pass `name` begins with."""
        if not self.has_ranges:
            raise ValueError(f"{name} needs scales to begin with; list it after fit_ranges")

    def need_float_weights(self, name):
        """Raises ValueError where weights are integers already, which the pass `name` was to see before."""
        if any(layer.weight_int is not None for layer in quant_layers(self.net).values()):
            raise ValueError(f"weights are integers already when {name} begins; list it before the passes that learn "
                             "or harden them")

    @property
    def device(self):
        return next(self.net.parameters()).device

    def fitted_copy(self, rules):
        """A copy of the network with fitted ranges, by the own rules and these, for measurements."""
        copy = replace(self, net=convert(self.model.net, [*self.rules, *rules], self.net.timeline))
        fit_ranges(copy)
        return copy.net

    def layer_pairs(self):
        """Quantized layers and their originals."""
        return [(m, self.model.net.get_submodule(name)) for name, m in quant_layers(self.net).items()]


@torch.no_grad()
def fit_ranges(job, *, num_samples=256, batch_size=64, neighbours=0):
    """Choose every scale and zero point: weights from the weights, activations from `num_samples` calibration samples
    (None: all) through the full-precision network, `batch_size` at a time, which a moving average (`ema`) goes by.
    Where segments of time are short, each has few samples and misses outliers; those of the `neighbours` segments on
    either side then help."""
    job.need_float_weights("fit_ranges")
    layers = [m for m in quant_layers(job.net).values() if m.weight_quantizer is not None]
    quantizers = input_quantizers(job.net).values()
    for layer in layers:
        layer.fit_weight()
    try:
        sample = job.calibration.subset(num_samples, job.net.timeline, job.seed)
        for q in quantizers:
            q.begin_observing(len(sample))
        with in_full_precision(job.net):
            for arguments in sample.batches(job.batch(batch_size)) if quantizers else ():
                job.net(*(a.to(job.device) for a in arguments))
        for q in quantizers:
            q.fit_observed(neighbours, batch_size)
    finally:
        for q in quantizers:
            q.observed = None
    return [{"pass": "fit_ranges", "weights": len(layers), "inputs": len(quantizers)}]


PASSES = {"fit_ranges": fit_ranges, "reconstruct": reconstruct, "balance": balance, "softmax_grid": softmax_grid,
          "allocate_bits": allocate_bits, "step_bits": step_bits, "dynamic_scales": dynamic_scales,
          "group_scales": group_scales, "reconstruct_temporal": reconstruct_temporal, "segment_models": segment_models,
          "bypass_input": bypass_input, "finetune": finetune, "correct_noise": correct_noise,
          "decide_by_ranges": decide_by_ranges}


# Kind of an option's default, what may stand in its place, how that is called
KINDS = [(bool, bool, "true or false"), (int, int, "a whole number, 0 or more"), (float, (int, float), "a number"),
         ((list, tuple), (list, tuple), "a list")]


def find_pass(name):
    """The function behind a name in the YAML."""
    module, _, function = name.rpartition(".")
    if not module:
        if name not in PASSES:
            raise ValueError(unknown_word(f"pass '{name}' is unknown", name, PASSES))
        return PASSES[name]
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"pass '{name}' cannot be imported ({error}); is its folder in PYTHONPATH?") from None
    if not inspect.isfunction(found) or next(iter(inspect.signature(found).parameters), None) != "job":
        raise ValueError(f"'{name}' is no pass; write it as a function (job, *, option=default) -> facts")
    return found


def named(entry):
    """An entry of a list of passes -> (name, options)."""
    if isinstance(entry, dict) and len(entry) != 1:
        raise ValueError(f"pass entry {entry} must be one name with its options, for example {{fit_ranges: {{}}}}")
    (name, options), = entry.items() if isinstance(entry, dict) else ((entry, {}),)
    if not isinstance(name, str) or not isinstance(options or {}, dict):
        raise ValueError(f"pass entry {entry} must be a name, or one with a mapping of its options")
    if not isinstance((options or {}).get("passes", []), list):
        raise ValueError(f"passes of {name} must be a list; found {options['passes']}")
    return name, options or {}


def changed_passes(passes, changes):
    """The list of passes with {name: {option: value}} on top of what it says; {name: None} leaves that pass out, also
    of the passes inside another one. Raises ValueError for a name that is not in the list."""
    found = set()

    def changed(entries):
        result = []
        for name, options in map(named, entries):
            found.add(name)
            if "passes" in options:
                options = options | {"passes": changed(options["passes"])}
            if changes.get(name, {}) is not None:
                result.append({name: options | changes.get(name, {})})
        return result
    for name, own in changes.items():
        if not isinstance(own, dict | None):
            raise ValueError(f"pass_options.{name} is {own}; it must be a mapping such as {{batch_size: 16}}, or null")
    result = changed(passes)
    for name in changes:
        if name not in found:
            complaint = f"pass_options names the pass '{name}', which this method does not have"
            raise ValueError(unknown_word(complaint, name, sorted(found)))
    return result


def check_passes(passes, *, importing=False):
    """Raises ValueError for an unknown pass or option, a value of another kind than the option's default, or an order
    that cannot work; returns [(name, options)]. Passes named module.function are taken as they are unless
    `importing`."""
    checked = []
    for entry in passes:
        name, options = named(entry)
        if importing or "." not in name:
            known = dict(inspect.signature(find_pass(name)).parameters)
            del known["job"]
            for key, value in options.items():
                if key not in known:
                    raise ValueError(unknown_word(f"pass '{name}' has no option '{key}'", key, known))
                check_option(name, key, value, known[key])
        check_passes(options.get("passes", []), importing=importing)
        checked.append((name, options))
    check_order(checked)
    return checked


def check_option(name, key, value, parameter):
    """Raises ValueError for a word that is none of the option's Literal, a value of another kind than its default, or
    a Share that is none; null is left to the pass."""
    words, default = get_args(parameter.annotation), parameter.default
    if words and value not in words:
        *most, last = (str(word).lower() for word in words)
        raise ValueError(f"{key} '{value}' of {name} is unknown; choose {', '.join(most)} or {last}")
    kind, accepted, called = next((row for row in KINDS if isinstance(default, row[0])), (None, object, ""))
    if words or value is None or kind is None:
        return
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool) or kind is int and value < 0:
        raise ValueError(f"{key} of {name} is {value}; it must be {called}")
    if parameter.annotation is Share and not 0 <= value <= 1:
        raise ValueError(f"{key} of {name} is {value}; it must lie between 0 and 1")


def run_passes(job, passes):
    """Run them in order, then harden what is still soft; returns all facts. Each has a resume folder of its own."""
    facts, write, folder = [], job.note, job.resume_folder
    for i, (name, options) in enumerate(check_passes(passes, importing=True)):
        job.note, job.resume_folder = lambda new: write(facts + new), folder / f"{i}_{name}"
        facts += find_pass(name)(job, **options)
        write(facts)
    job.resume_folder = folder
    if not job.has_ranges:
        raise ValueError("the passes are over and no one has fitted all scales; list fit_ranges")
    for layer in quant_layers(job.net).values():
        layer.harden()
    for q in input_quantizers(job.net).values():
        q.harden()
    return facts

"""Passes: functions (job, **options) -> facts, run in the order of the method's YAML.

The YAML names a pass by its key in PASSES or, which needs no key here, as module.function: any
function that Python can import, so quant.shrink.shrink for the function shrink of a new
quant/shrink.py. Such a module is imported only where passes run, by scripts/quantize.py: to open,
sample or score a run folder from elsewhere runs no code that it names; before quantizing by a
recipe from elsewhere, read its passes."""

import importlib
import inspect
from typing import get_args

from base.config import Share
from base.errors import unknown_word
from quant.network import input_quantizers, quant_layers
from quant.passes.allocate_bits import allocate_bits
from quant.passes.balance import balance
from quant.passes.bypass_input import bypass_input
from quant.passes.correct_noise import correct_noise
from quant.passes.decide_by_ranges import decide_by_ranges
from quant.passes.dynamic_scales import dynamic_scales
from quant.passes.finetune import finetune
from quant.passes.fit_ranges import fit_ranges
from quant.passes.group_scales import group_scales
from quant.passes.order import check_order
from quant.passes.reconstruct import reconstruct
from quant.passes.reconstruct_temporal import reconstruct_temporal
from quant.passes.segment_models import segment_models
from quant.passes.softmax_grid import softmax_grid
from quant.passes.step_bits import step_bits

PASSES = {
    "fit_ranges": fit_ranges,
    "reconstruct": reconstruct,
    "balance": balance,
    "softmax_grid": softmax_grid,
    "allocate_bits": allocate_bits,
    "step_bits": step_bits,
    "dynamic_scales": dynamic_scales,
    "group_scales": group_scales,
    "reconstruct_temporal": reconstruct_temporal,
    "segment_models": segment_models,
    "bypass_input": bypass_input,
    "finetune": finetune,
    "correct_noise": correct_noise,
    "decide_by_ranges": decide_by_ranges,
}
# Kind of an option's default, what may stand in its place, how that is called
KINDS = [
    (bool, bool, "true or false"),
    (int, int, "a whole number, 0 or more"),
    (float, (int, float), "a number"),
    ((list, tuple), (list, tuple), "a list"),
]


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
        raise ValueError(
            f"pass '{name}' cannot be imported ({error}); is its folder in PYTHONPATH?"
        ) from None
    if (
        not inspect.isfunction(found)
        or next(iter(inspect.signature(found).parameters), None) != "job"
    ):
        raise ValueError(
            f"'{name}' is no pass; write it as a function (job, *, option=default) -> facts"
        )
    return found


def named(entry):
    """An entry of a list of passes -> (name, options)."""
    if isinstance(entry, dict) and len(entry) != 1:
        raise ValueError(
            f"pass entry {entry} must be one name with its options, for example {{fit_ranges: "
            f"{{}}}}"
        )
    ((name, options),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
    if not isinstance(name, str) or not isinstance(options or {}, dict):
        raise ValueError(f"pass entry {entry} must be a name, or one with a mapping of its options")
    if not isinstance((options or {}).get("passes", []), list):
        raise ValueError(f"passes of {name} must be a list; found {options['passes']}")
    return name, options or {}


def changed_passes(passes, changes):
    """The list of passes with {name: {option: value}} on top of what it says; {name: None} leaves
    that pass out, also of the passes inside another one. Raises ValueError for a name that is not
    in the list."""
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
            raise ValueError(
                f"pass_options.{name} is {own}; it must be a mapping such as {{batch_size: 16}}, "
                "or null"
            )
    result = changed(passes)
    for name in changes:
        if name not in found:
            complaint = f"pass_options names the pass '{name}', which this method does not have"
            raise ValueError(unknown_word(complaint, name, sorted(found)))
    return result


def check_passes(passes, *, importing=False):
    """Raises ValueError for an unknown pass or option, a value of another kind than the option's
    default, or an order that cannot work; returns [(name, options)]. Passes named module.function
    are taken as they are unless `importing`."""
    checked = []
    for entry in passes:
        name, options = named(entry)
        if importing or "." not in name:
            known = dict(inspect.signature(find_pass(name)).parameters)
            del known["job"]
            for key, value in options.items():
                if key not in known:
                    raise ValueError(
                        unknown_word(f"pass '{name}' has no option '{key}'", key, known)
                    )
                check_option(name, key, value, known[key])
        check_passes(options.get("passes", []), importing=importing)
        checked.append((name, options))
    check_order(checked)
    return checked


def check_option(name, key, value, parameter):
    """Raises ValueError for a word that is none of the option's Literal, a value of another kind
    than its default, or a Share that is none; null is left to the pass."""
    words, default = get_args(parameter.annotation), parameter.default
    if words and value not in words:
        *most, last = (str(word).lower() for word in words)
        raise ValueError(
            f"{key} '{value}' of {name} is unknown; choose {', '.join(most)} or {last}"
        )
    kind, accepted, called = next(
        (row for row in KINDS if isinstance(default, row[0])), (None, object, "")
    )
    if words or value is None or kind is None:
        return
    if (
        not isinstance(value, accepted)
        or isinstance(value, bool) != (kind is bool)
        or kind is int
        and value < 0
    ):
        raise ValueError(f"{key} of {name} is {value}; it must be {called}")
    if parameter.annotation is Share and not 0 <= value <= 1:
        raise ValueError(f"{key} of {name} is {value}; it must lie between 0 and 1")


def run_passes(job, passes):
    """Run them in order, then harden what is still soft; returns all facts. Each has a resume
    folder of its own."""
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

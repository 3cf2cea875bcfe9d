"""effort.dtype: auto, decided on the machine that learns: bf16 only where its processor computes
that itself, and a trial of a few steps finds it clearly faster: what learns in float32 anyhow is
worth more than a few percent, and the choice should not hang on noise."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from typing import Any

from base.devices import computes_bfloat16
from base.workers import agreed
from quant.passes.find import declaration_of
from quant.passes.job import Job
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import Trial, first_large, processor_seconds, seconds_by_dtype
from tinydm.recipe import RunConfig

WORTH = 0.9  # of the time in fp32
Options = dict[str, Any]


def decided(config: RunConfig, job: Job, log: Callable[[str], Any]) -> tuple[RunConfig, Options]:
    """Decides where a recipe leaves the data type of learning to the machine and learns at all;
    returns the recipe with it, and what was measured: the unit, and seconds of a step in each data
    type. `log` is told in a line."""
    learning = learning_of(config.all_passes)
    if config.effort.dtype != "auto" or not learning:
        return config, {}
    if not agreed(computes_bfloat16(job.device)):
        log("effort.dtype: fp32, as this processor does not compute bfloat16 itself")
        return config.with_dtype("fp32"), {}
    unit = first_large(job.graph)
    arguments = inputs_of(job.model.net, [unit], job.calibration.rows(slice(0, 1)), 1, whole=True)
    original = job.model.net.get_submodule(unit)
    trial = Trial(job.net, unit, original, arguments[unit], job.calibration.t)
    if job.device.type == "cpu":
        trial.clock = processor_seconds
    seconds = agreed(seconds_by_dtype(trial, *settings_of(learning)))
    dtype = quicker(seconds)
    told = " and ".join(f"{1000 * s:.1f} ms in {kind}" for kind, s in seconds.items())
    log(f"effort.dtype: {dtype}; a step of {unit} took {told}")
    return config.with_dtype(dtype), {"unit": unit} | {k: round(s, 6) for k, s in seconds.items()}


def quicker(seconds: dict[str, float]) -> str:
    """The data type to learn in, of those that took these seconds."""
    return "bf16" if seconds["bf16"] < WORTH * seconds["fp32"] else "fp32"


def all_of(passes: Iterable[dict[str, Options]]) -> Iterator[tuple[str, Options]]:
    """Passes with their options, also those inside another one."""
    for name, options in (item for entry in passes for item in entry.items()):
        yield name, options
        yield from all_of(options.get("passes", []))


def learning_of(passes: Iterable[dict[str, Options]]) -> list[tuple[str, Options]]:
    """The passes that learn in a data type."""
    return [(n, o) for n, o in all_of(passes) if "dtype" in declaration_of(n).effort]


def settings_of(passes: Iterable[tuple[str, Options]]) -> tuple[Objective, Schedule]:
    """What `reconstruct` learns towards and how, where it is one of these passes."""
    options = next((options for name, options in passes if name == "reconstruct"), {})
    return tuple(
        kind(**{part.name: options[part.name] for part in fields(kind) if part.name in options})
        for kind in (Objective, Schedule)
    )

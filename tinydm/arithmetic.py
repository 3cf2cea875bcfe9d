"""effort.dtype: auto, decided on the machine that learns: bf16 only where its processor computes
that itself, and a trial of a few steps finds it clearly faster: what learns in float32 anyhow is
worth more than a few percent, and the choice should not hang on noise."""

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

from base.devices import computes_bfloat16
from base.workers import agreed
from quant.passes.find import declaration_of
from quant.passes.job import Job
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import Trial, first_large, seconds_by_dtype
from tinydm.recipe import RunConfig

WORTH = 0.9  # of the time in fp32


def decided(
    config: RunConfig, job: Job, log: Callable[[str], Any]
) -> tuple[RunConfig, dict[str, Any]]:
    """Decides where a recipe leaves the data type of learning to the machine and learns at all;
    returns the recipe with it, and what was measured: the unit, and seconds of a step in each data
    type. `log` is told in a line."""
    learning = [
        (n, o) for n, o in _all_of(config.all_passes) if "dtype" in declaration_of(n).effort
    ]
    if config.effort.dtype != "auto" or not learning:
        return config, {}
    if not agreed(computes_bfloat16(job.device)):
        log("effort.dtype: fp32, as this processor does not compute bfloat16 itself")
        return config.with_dtype("fp32"), {}
    options = next((options for name, options in learning if name == "reconstruct"), {})
    objective, schedule = (
        kind(**{part.name: options[part.name] for part in fields(kind) if part.name in options})
        for kind in (Objective, Schedule)
    )
    unit = first_large(job.graph)
    arguments = inputs_of(job.model.net, [unit], job.calibration.rows(slice(0, 1)), 1, whole=True)
    original = job.model.net.get_submodule(unit)
    trial = Trial(job.net, unit, original, arguments[unit], job.calibration.t)
    seconds = agreed(seconds_by_dtype(trial, objective, schedule))
    dtype = "bf16" if seconds["bf16"] < WORTH * seconds["fp32"] else "fp32"
    told = " and ".join(f"{1000 * s:.1f} ms in {kind}" for kind, s in seconds.items())
    log(f"effort.dtype: {dtype}; a step of {unit} took {told}")
    return config.with_dtype(dtype), {"unit": unit} | {k: round(s, 6) for k, s in seconds.items()}


def _all_of(passes: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Passes with their options, also those inside another one."""
    for name, options in (item for entry in passes for item in entry.items()):
        yield name, options
        yield from _all_of(options.get("passes", []))

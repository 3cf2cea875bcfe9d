"""Checks and runs a method's list of passes: functions (job, **options) -> rows of facts.

Passes from elsewhere (quant/passes/find.py) are imported only where passes run: to open, sample or
score a run folder runs no code that it names. Before quantizing by a recipe, read its passes."""

import inspect
import time
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from base.config import Share
from base.devices import return_memory
from base.errors import check_options, unknown_word
from base.workers import align
from quant.network import harden
from quant.passes.find import declaration_of, find_pass
from quant.passes.job import Facts, Job
from quant.passes.order import check_order

Entry = str | dict[str, dict[str, Any] | None]  # of the YAML: a name, or {name: options}
# Kind of an option's default, what may stand in its place, how that is called
KINDS = [
    (bool, bool, "true or false"),
    (int, int, "a whole number, 0 or more"),
    (float, (int, float), "a number"),
    ((list, tuple), (list, tuple), "a list"),
]


def named(entry: Entry) -> tuple[str, dict[str, Any]]:
    """An entry of a list of passes -> (name, options)."""
    if isinstance(entry, dict) and len(entry) != 1:
        example = "{fit_ranges: {}}"
        raise ValueError(
            f"pass entry {entry} must be one name with its options, for example {example}"
        )
    ((name, options),) = entry.items() if isinstance(entry, dict) else ((entry, {}),)
    options = options or {}
    if not isinstance(name, str) or not isinstance(options, dict):
        raise ValueError(f"pass entry {entry} must be a name, or one with a mapping of its options")
    if not isinstance(options.get("passes", []), list):
        raise ValueError(f"passes of {name} must be a list; found {options['passes']}")
    return name, options


def with_effort(passes: Iterable[Entry], effort: Mapping[str, Any]) -> list[Entry]:
    """Gives the learning passes of a list, also those inside another one, the counts and rates of
    `effort` that the list does not say itself; what `effort` lacks is left to the pass."""
    passes, result = list(passes), []
    names = [name for name, _ in map(named, passes)]
    for entry in passes:
        name, options = named(entry)
        declared, filled = declaration_of(name), dict(options)
        said = options.keys() | declared.idle(options, names)
        filled |= {
            option: effort[key]
            for option, key in declared.effort.items()
            if option not in said and key in effort
        }
        if "passes" in options:
            filled["passes"] = with_effort(options["passes"], effort)
        result.append(entry if filled == options else {name: filled})
    return result


def changed_passes(passes: Iterable[Entry], changes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The list of passes with {name: {option: value}} on top of what it says; {name: None} leaves
    that pass out, also of the passes inside another one. Raises ValueError for a name that is not
    in the list."""
    for name, own in changes.items():
        if not isinstance(own, dict | None):
            raise ValueError(
                f"pass_options.{name} is {own}; it must be a mapping such as {{batch_size: 16}}, "
                "or null"
            )
    found = set()
    result = _changed(passes, changes, found)
    for name in changes:
        if name not in found:
            complaint = f"pass_options names the pass '{name}', which this method does not have"
            raise ValueError(unknown_word(complaint, name, sorted(found)))
    return result


def _changed(passes, changes, found):
    """Adds the names in the list to `found`."""
    result = []
    for name, options in map(named, passes):
        found.add(name)
        if "passes" in options:
            options = options | {"passes": _changed(options["passes"], changes, found)}
        change = changes.get(name, {})
        if change is not None:
            result.append({name: options | change})
    return result


def check_passes(
    passes: Iterable[Entry], *, importing: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """Raises ValueError for an unknown pass or option, a value of another kind than the option's
    default, or an order that cannot work; returns [(name, options)]. Passes named module.function
    are taken as they are unless `importing`."""
    checked = []
    for name, options in map(named, passes):
        if importing or "." not in name:
            known = dict(inspect.signature(find_pass(name)).parameters)
            del known["job"]
            check_options(f"pass '{name}'", options, known)
            for key, value in options.items():
                _check_value(name, key, value, known[key])
        check_passes(options.get("passes", []), importing=importing)
        checked.append((name, options))
    check_order(checked)
    return checked


def _check_value(name, key, value, parameter):
    """Raises ValueError for a word that is none of the option's Literal, a value of another kind
    than its default, or a Share that is none; null is left to the pass."""
    annotation, default = parameter.annotation, parameter.default
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            *most, last = (str(word).lower() for word in get_args(annotation))
            words = f"{', '.join(most)} or {last}"
            raise ValueError(f"{key} '{value}' of {name} is unknown; choose {words}")
        return
    row = next((row for row in KINDS if isinstance(default, row[0])), None)
    if value is None or row is None:
        return
    kind, accepted, called = row
    fits = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)
    if not fits or kind is int and value < 0:
        raise ValueError(f"{key} of {name} is {value}; it must be {called}")
    if annotation is Share and not 0 <= value <= 1:
        raise ValueError(f"{key} of {name} is {value}; it must lie between 0 and 1")


def run_passes(job: Job, passes: Iterable[Entry]) -> Facts:
    """Runs them in order, then hardens what is still soft; returns the facts of all, those of each
    pass closed by the seconds that it took. Each has a resume folder of its own; in the end the job
    has its old one again. Several workers (base/workers.py) run the passes alike, some share the
    work of one, and after each the network is that of the first."""
    facts, note, folder = [], job.note, job.resume_folder
    checked = check_passes(passes, importing=True)
    for name, options in checked:
        declaration_of(name).begin(job, options)
    try:
        for i, (name, options) in enumerate(checked):
            job.note = lambda new, earlier=tuple(facts): note([*earlier, *new])
            job.resume_folder = folder / f"{i}_{name}"
            started = time.monotonic()
            facts += find_pass(name)(job, **options)
            align(job.net)
            return_memory()
            facts.append({"pass": name, "seconds": time.monotonic() - started})
            note(facts)
    finally:
        job.note, job.resume_folder = note, folder
    if not job.has_ranges:
        raise ValueError("the passes are over and no one has fitted all scales; list fit_ranges")
    harden(job.net)
    return facts

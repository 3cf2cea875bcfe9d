"""Which passes go together, and in which order: what cannot work is refused before any work
begins."""

from collections.abc import Iterable
from typing import Any

from quant.passes.declare import Plan
from quant.passes.find import declaration_of

Entries = Iterable[tuple[str, dict[str, Any]]]  # names of passes and their options


def check_order(passes: Entries) -> None:
    """Raises ValueError for a list of (name, options) that cannot work, whatever the network: a
    pass that would undo what an earlier one did, or come too late for it. Passes from elsewhere,
    `module.function`, may stand anywhere but behind those that measure the finished network."""
    passes = list(passes)
    names = [name for name, _ in passes]
    declared = {name: declaration_of(name) for name in names}
    for i, name in enumerate(names):
        for earlier in names[:i]:
            _check_pair(earlier, name, declared)
    for name in names:
        for other, why in declared[name].excludes.items():
            if other in names:
                raise ValueError(f"{name} and {other} do not go together: {why}; leave one out")
    for outer, options in passes:
        for inner in _inner_names(options):
            if why := declaration_of(inner).inside_segments:
                raise ValueError(f"{inner} cannot be inside {outer}: {why}")


def _check_pair(earlier, name, declared):
    before, now = declared[earlier], declared[name]
    if name == earlier and now.once:
        raise ValueError(f"{name} is listed twice; list it once")
    if before.moment and now.moment and now.moment.place < before.moment.place:
        raise ValueError(f"{name} {now.moment.value}; list it before {earlier}")
    if before.measures and not now.moment:
        raise ValueError(
            f"{earlier} measured the finished network, which {name} would change; list it before "
            f"{earlier}"
        )


def _inner_names(options):
    """Names of the passes that are an option of another one."""
    inner = options.get("passes", [])
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in inner]


def check_needs(passes: Entries, rules: list[dict[str, Any]], num_segments: int) -> None:
    """Raises ValueError where the rules or the number of time segments are not those that a list of
    (name, options) needs."""
    passes = list(passes)
    names = [name for name, _ in passes]
    every = [*names, *(inner for _, options in passes for inner in _inner_names(options))]
    if "fit_ranges" not in every and not any("." in name for name in every):
        raise ValueError("no pass fits the scales; list fit_ranges")
    for name, options in passes:
        declared = declaration_of(name)
        if declared.needs_segments and num_segments == 1:
            raise ValueError(
                f"{name} needs several time segments; set segments: {declared.needs_segments}"
            )
        declared.check(Plan(options, names, rules, num_segments))
    if not any(rule.get("weight", {}).get("per_segment") for rule in rules):
        return
    if "segment_models" not in names and not any("." in name for name in names):
        raise ValueError(
            "own weights for every time segment (per_segment) are made by the pass "
            "segment_models, inside which fit_ranges and reconstruct belong; list it, or leave out "
            "per_segment"
        )
    for name in names:
        if declaration_of(name).one_network:
            raise ValueError(
                f"{name} works on one network for all steps, this one has own weights for every "
                f"time segment (per_segment); leave out {name}, or per_segment"
            )

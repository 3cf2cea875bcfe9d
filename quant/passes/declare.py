"""What a pass says of itself, so that a list of passes can be checked before any work begins."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import wraps
from typing import Any

# why a pass cannot be inside segment_models
DECIDES = "it decides for the whole network; list it before segment_models"
GIVES_SCALES = "each of the segments has one scale alone; leave it out"


class Moment(Enum):
    """When a pass runs, from first to last, and why it cannot wait for those of a later moment."""

    DECIDE = "decides about the network as it was"
    BALANCE = "changes what scales are fitted to"
    SEGMENT = "begins every segment with the network as it was"
    FIT = "fits scales to weights that nothing has rounded yet"
    MODEL = "gives functions in place of scales, which later passes learn"
    TEMPORAL = "learns layers that the blocks are learned upon"
    LEARN = "learns what later passes go on from"
    FINISH = "changes the network that later passes measure"
    MEASURE = "measures the finished network"

    @property
    def place(self) -> int:
        """Its number in the order."""
        return list(Moment).index(self)


@dataclass(frozen=True)
class Plan:
    """What the check of a pass sees: its options, the names of all passes that are listed with it,
    the rules, and the number of time segments."""

    options: dict[str, Any]
    names: list[str]
    rules: list[dict[str, Any]]
    num_segments: int


@dataclass(frozen=True)
class Declaration:
    """What a pass says of itself; the defaults are those of a pass that declares nothing."""

    moment: Moment | None = None  # None: anywhere but behind passes that measure
    once: bool = False  # may be listed once
    measures: bool = False  # what it finds holds for the network that it sees
    excludes: Mapping[str, str] = field(default_factory=dict)  # another pass -> why not both
    inside_segments: str = ""  # why it cannot be inside segment_models, if it cannot
    needs_segments: str = ""  # what to set `segments` to, if it needs several
    one_network: bool = False  # cannot work with own weights for every time segment
    # an option that the YAML does not say -> the key of `effort` that says it then
    effort: Mapping[str, str] = field(default_factory=dict)
    # (options, names of all passes) -> options of `effort` that would decide nothing
    idle: Callable[[dict[str, Any], list[str]], set[str]] = lambda options, names: set()
    check: Callable[[Plan], None] = lambda plan: None  # raises ValueError for what cannot work
    # (job), before any pass runs: raises ValueError for what this machine cannot do
    begin: Callable[[Any, dict[str, Any]], Any] = lambda job, options: None


def quant_pass(**said: Any) -> Callable[[Callable], Callable]:
    """Declares the function below it as a pass, by the fields of Declaration."""
    declaration = Declaration(**said)

    def declare(function):
        function.declaration = declaration
        return function

    return declare


def with_fields(function: Callable) -> Callable:
    """Makes a pass (job, *, name: dataclass, ...) one that takes the fields of these dataclasses as
    options, with their defaults; options of its own stay."""
    given = inspect.signature(function).parameters
    options = {name: p.annotation for name, p in given.items() if p.kind is p.KEYWORD_ONLY}
    groups = {name: group for name, group in options.items() if is_dataclass(group)}
    flat = [parameter for name, parameter in given.items() if name not in groups]
    for one in (one for group in groups.values() for one in fields(group)):
        stated = {"default": one.default, "annotation": one.type}
        flat.append(inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, **stated))
    signature = inspect.Signature(flat)

    @wraps(function)
    def call(*arguments, **options):
        signature.bind(*arguments, **options)
        for name, group in groups.items():
            own = {one.name for one in fields(group)} & options.keys()
            options[name] = group(**{key: options.pop(key) for key in own})
        return function(*arguments, **options)

    call.__signature__ = signature
    return call

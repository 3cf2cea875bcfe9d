"""Generated parts of docs/methods.md and docs/configuration.md: methods from the heads of their
YAMLs, keys from dataclasses, options from the signatures of passes and builders."""

import importlib
import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from textwrap import wrap
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf

from base.config import load, read_yaml
from base.files import PROJECT
from quant.calibration.builders import BUILDERS
from quant.passes.find import find_pass, pass_names
from quant.passes.run import named, with_effort
from tinydm.keys import describe_keys, show
from tinydm.plan import CompareConfig
from tinydm.recipe import Effort
from tinydm.report.table import lines_of

RELEASED = "_as_released"
FROM_EFFORT = {one.name: f"${{effort.{one.name}}}" for one in fields(Effort)}
WIDTH = 120  # columns of a page


# Methods


def methods_block() -> list[str]:
    """An overview of all methods, then a section for each, with its released form below it."""
    files = method_names()
    rows = []
    for name in files:
        passes = [f"`{one}`" for one, _ in map(named, _read(name).get("passes", []))]
        rows.append([f"[`{name}`](#{name})", _source(name), ", ".join(passes)])
    lines = lines_of(["`METHOD`", "from", "passes"], rows)
    for name in files:
        lines += ["", f"{'###' if name.endswith(RELEASED) else '##'} {name}", "", *_section(name)]
    return lines


def method_names() -> list[str]:
    """Names of the methods in the order of configs/compare/equal.yaml, the others behind them;
    a released form follows what it is a form of."""
    folder = PROJECT / "configs/method"
    names = {path.stem for path in folder.glob("*.yaml")}
    listed = load(CompareConfig, [PROJECT / "configs/compare/equal.yaml"]).methods
    whole = [*listed, *sorted(name for name in names - {*listed} if not name.endswith(RELEASED))]
    return [name for one in whole for name in (one, one + RELEASED) if name in names]


def _read(name):
    """A method's YAML on its base, references to other keys as they are written."""
    return OmegaConf.to_container(read_yaml(PROJECT / f"configs/method/{name}.yaml"))


def _head(name):
    """The lines of the comment at the top of a method's YAML."""
    lines = (PROJECT / f"configs/method/{name}.yaml").read_text().splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#").strip() for line in lines[:end]]


def _source(name):
    """What the head says in parentheses up to an arXiv number, which becomes a link."""
    found = re.search(r"\(([^()]*)arXiv:([\d.]+\d)", " ".join(_head(name.removesuffix(RELEASED))))
    if not found:
        return "–"
    words, number = found.groups()
    return f"{words}[arXiv:{number}](https://arxiv.org/abs/{number})"


def _section(name):
    method = _read(name)
    calibration = method.get("calibration", {})
    builder = calibration.get("builder", "uniform")
    options = calibration.get("options")
    facts = [
        f"`segments: {show(method.get('segments', 1))}`",
        f"calibration by `{builder}`" + (f" with `{show(options)}`" if options else ""),
    ]
    if "start" in calibration:
        facts.append(f"trajectories from `{calibration['start']}`")
    rules = [[_who(rule), _spec(rule, "weight"), _spec(rule, "input")] for rule in method["rules"]]
    rules = lines_of(["rule for", "weights", "inputs"], rules)
    passes = _pass_rows(with_effort(method.get("passes", []), FROM_EFFORT))
    passes = lines_of(["pass", "of the method", "from the preset"], passes)
    facts = f"*Time and data:* {', '.join(facts)}."
    return [*_head(name), "", facts, "", *rules, "", *passes]


def _who(rule):
    """What a rule speaks of."""
    listed = rule.get("role", [])
    roles = ", ".join(listed if isinstance(listed, list) else [listed])
    match = rule.get("match", "*")
    parts = ["attention products"] if rule.get("kind") == "matmul" else []
    parts += [roles] if roles else []
    parts += [f"`{match}`"] if match != "*" else []
    words = ", ".join(parts) or "all layers and products"
    return words + "; `balance`" * bool(rule.get("balance"))


def _spec(rule, part):
    """What a rule says of weights or inputs, bits first."""
    spec = dict(rule.get(part, {}))
    bits = spec.pop("bits", "")
    width = "float" if bits == 32 else _plain(bits)
    rest = [f"{key}: {show(value)}" for key, value in spec.items()]
    return ", ".join(filter(None, [f"`{width}`" if width else "", *(f"`{one}`" for one in rest)]))


def _plain(value):
    """${bits.weight} -> bits.weight."""
    return re.sub(r"^\$\{(.*)\}$", r"\1", str(value))


def _pass_rows(passes, inside=""):
    rows = []
    for name, options in map(named, passes):
        inner, preset, said = options.get("passes", []), [], []
        for key, value in options.items():
            if str(value).startswith("${effort."):
                preset.append(f"`{key}`")
            elif key != "passes":
                said.append(f"`{key}: {_plain(show(value))}`")
        rows.append([f"{inside}`{name}`", ", ".join(said) or "–", ", ".join(preset) or "–"])
        rows += _pass_rows(inner, f"{inside}in `{name}`: ")
    return rows


# Keys and options


def keys_block(path: str) -> list[str]:
    """Every key of the dataclass MODULE.CLASS with its type, default and meaning."""
    module, _, name = path.rpartition(".")
    schema = getattr(importlib.import_module(module), name)
    rows = [
        [f"`{key}`", f"`{kind}`", f"`{show(default)}`" if show(default) else "", comment]
        for key, kind, default, comment in describe_keys(schema)
    ]
    return lines_of(["key", "type", "default", "meaning"], rows)


def passes_block() -> list[str]:
    """Every pass with what it does and its options."""
    return _options_block({name: find_pass(name) for name in pass_names()})


def builders_block() -> list[str]:
    """Every builder of calibration sets with what it picks and its options."""
    return _options_block(BUILDERS)


def _options_block(functions: dict[str, Callable[..., Any]]) -> list[str]:
    lines = []
    for name, function in functions.items():
        lines += ["", f"### `{name}`", "", *_paragraphs(function), *_options(function)]
    return lines[1:]


def _paragraphs(function):
    """The docstring up to what it returns and raises, in lines of a page."""
    lines, text = [], re.sub(r"^The pass[:.] ", "", inspect.getdoc(function))
    text = text[0].upper() + text[1:]
    for paragraph in text.split("\n\n"):
        said = re.split(r"(?:^|(?<=\. ))(?:Facts|Raises|Returns)\b", " ".join(paragraph.split()))[0]
        if said:
            lines += [*wrap(said, WIDTH, break_long_words=False, break_on_hyphens=False), ""]
    return lines


def _options(function):
    """A line that lists the options with their defaults."""
    rows = []
    for option in inspect.signature(function).parameters.values():
        if option.kind is not option.KEYWORD_ONLY:
            continue
        choices = get_origin(option.annotation) is Literal
        words = [show(word) for word in get_args(option.annotation)] if choices else []
        default = "" if option.default is option.empty else show(_listed(option.default))
        rows.append([f"`{option.name}`", f"`{default}`" if default else "", " ".join(words)])
    if not rows:
        return ["No options."]
    if not any(row[2] for row in rows):
        return lines_of(["option", "default"], [row[:2] for row in rows])
    return lines_of(["option", "default", "choices"], rows)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value

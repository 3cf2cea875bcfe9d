"""YAML files merged left to right, then key=value: typed, strict, with a suggestion for a misspelt
key.

A schema is a dataclass; everything that reads a configuration gets a resolved plain dict or the
dataclass itself."""

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NewType, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from base.errors import unknown_word

Schema = TypeVar("Schema")  # a dataclass
Share = NewType("Share", float)  # annotates an option that lies in [0, 1]


def read_yaml(path: Path | str, above: Sequence[Path] = ()) -> DictConfig:
    """Reads one YAML file of keys and values. `base: FILE`, beside it, stands for all that FILE
    says, which the other keys go on top of; `first: {key: list}` and `last: {key: list}` put
    elements in front of a list of FILE's and behind it. Raises ValueError with the file's name
    where it is absent, empty or malformed, or its own base (`above`: what led here)."""
    path = Path(path)
    if path.resolve() in [other.resolve() for other in above]:
        raise ValueError(
            f"{path} is its own base; follow base: through {', '.join(map(str, above))}"
        )
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")], 3, 0.4
        )
        raise ValueError(
            f"configuration file {path} does not exist"
            + (f"; did you mean {' or '.join(near)}?" if near else "")
        )
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(content):
        raise ValueError(f"{path} must hold keys and values")
    return _on_its_base(path, content, above) if "base" in content else content


def _on_its_base(path, content, above):
    # references to other keys stay as they are written
    content = OmegaConf.to_container(content)
    first, last = (content.pop(end, None) or {} for end in ("first", "last"))
    base = read_yaml(path.parent / str(content.pop("base")), (*above, path))
    content = OmegaConf.to_container(OmegaConf.merge(base, content))
    wrong = [end for end in (first, last) if not isinstance(end, dict)] or [
        key
        for end in (first, last)
        for key in end
        if not isinstance(end[key], list) or not isinstance(content.get(key), list)
    ]
    if wrong:
        raise ValueError(
            f"{path}: first and last add lists to lists of the base, as first: {{passes: "
            f"[balance]}} does; {wrong[0]} is none"
        )
    for key in first | last:
        content[key] = [*first.get(key, []), *content[key], *last.get(key, [])]
    return OmegaConf.create(content)


def load(
    schema: type[Schema], files: Iterable[Path | str], overrides: Iterable[str] = ()
) -> Schema:
    """Merges `files` and `overrides` ("a.b=3") into the dataclass `schema`; returns an instance of
    it. Raises ValueError in one sentence for an unknown key (with "did you mean"), a wrong type or
    a malformed override."""
    config = OmegaConf.structured(schema)
    sources = [(str(path), lambda path=path: read_yaml(path)) for path in files]
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"'{text}' is not key=value")
        sources.append((f"'{text}'", lambda text=text: OmegaConf.from_dotlist([text])))
    for source, read in sources:
        try:
            content = read()
            config = OmegaConf.unsafe_merge(config, content)  # in place: both are ours alone
        except ConfigKeyError as error:
            raise ValueError(_unknown_key(config, source, error)) from None
        except OmegaConfBaseException as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{source}: key '{getattr(error, 'full_key', '') or '?'}': {reason}"
            ) from None
        except yaml.YAMLError as error:
            raise ValueError(
                f"{source} has a malformed value: {' '.join(str(error).split())}"
            ) from None
        # what OmegaConf says of a list in place of a mapping
        except TypeError:
            raise ValueError(
                f"{source}: a list or mapping stands where the other, or a plain value, belongs"
            ) from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join(map(str, files))}: {str(error).splitlines()[0]}") from None


def _unknown_key(config, source, error):
    full = str(error.full_key or error.key)
    parent, _, word = full.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    known = [str(key) for key in node] if OmegaConf.is_dict(node) else []
    return unknown_word(f"{source}: unknown key '{full}'", re.sub(r"\[\d+\]$", "", word), known)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Turns nested dicts into {dotted key: value}; an empty dict leaves nothing."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: value
        for key, sub in tree.items()
        for name, value in flatten(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits the words of a command line into those that are no key=value, and those that are."""
    arguments = list(arguments)
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def one_folder(arguments: Iterable[str]) -> tuple[str, list[str]]:
    """Takes the run folder and the overrides from the command line of a later stage. Raises
    ValueError where there is no folder, or several."""
    plain, overrides = split_arguments(arguments)
    if len(plain) != 1:
        raise ValueError(
            f"expected one run folder and key=value words, found {' '.join(plain) or 'no folder'}"
        )
    return plain[0], overrides

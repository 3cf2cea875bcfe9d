"""YAML files merged left to right, then key=value: typed, strict, with a suggestion for a misspelt
key. A schema is a dataclass; who reads a configuration gets a resolved plain dict or that class."""

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
        way = ", ".join(map(str, above))
        raise ValueError(f"{path} is its own base; follow base: through {way}")
    if not path.is_file():
        there = [file.name for file in path.parent.glob("*.yaml")]
        near = " or ".join(difflib.get_close_matches(path.name, there, 3, 0.4))
        hint = f"; did you mean {near}?" if near else ""
        raise ValueError(f"configuration file {path} does not exist{hint}")
    try:
        content = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(error)}") from None
    if not OmegaConf.is_dict(content):
        raise ValueError(f"{path} must hold keys and values")
    return _on_its_base(path, content, above) if "base" in content else content


def _one_line(error):
    return " ".join(str(error).split())


def _on_its_base(path, content, above):
    content = OmegaConf.to_container(content)  # references to other keys stay as they are written
    first, last = (content.pop(end, None) or {} for end in ("first", "last"))
    base = read_yaml(path.parent / str(content.pop("base")), (*above, path))
    content = OmegaConf.to_container(OmegaConf.merge(base, content))
    wrong = [end for end in (first, last) if not isinstance(end, dict)]
    for key in [] if wrong else [*first, *last]:
        lists = [tree[key] for tree in (first, content, last) if key in tree]
        if key not in content or not all(isinstance(part, list) for part in lists):
            wrong.append(key)
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
    """Merges `files` and `overrides` ("a.b=3") into an instance of the dataclass `schema`. Raises
    ValueError for an unknown key (with "did you mean"), a wrong type, a malformed override.

    A schema may have `renewed`, which says what files of earlier versions say (nested dicts) in
    today's words; overrides have to be in these."""
    config = OmegaConf.structured(schema)
    sources = [(str(path), lambda path=path: _renewed(schema, read_yaml(path))) for path in files]
    for text in overrides:
        if "=" not in text:
            raise ValueError(f"'{text}' is not key=value")
        sources.append((f"'{text}'", lambda text=text: _override(schema, text)))
    for source, read in sources:
        try:
            content = read()
            config = OmegaConf.unsafe_merge(config, content)  # in place: both are ours alone
        except ConfigKeyError as error:
            raise ValueError(_unknown_key(config, source, error)) from None
        except OmegaConfBaseException as error:
            key, reason = getattr(error, "full_key", "") or "?", str(error).splitlines()[0]
            raise ValueError(f"{source}: key '{key}': {reason}") from None
        except yaml.YAMLError as error:
            raise ValueError(f"{source} has a malformed value: {_one_line(error)}") from None
        except TypeError:  # what OmegaConf says of a list in place of a mapping
            raise ValueError(
                f"{source}: a list or mapping stands where the other, or a plain value, belongs"
            ) from None
    try:
        return OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ValueError(f"{', '.join(map(str, files))}: {str(error).splitlines()[0]}") from None


def _renewed(schema, content):
    if not hasattr(schema, "renewed"):
        return content
    tree = OmegaConf.to_container(content)  # references to other keys stay as they are written
    today = schema.renewed(tree)
    return content if today == tree else OmegaConf.create(today)


def _override(schema, text):
    """One override. Raises ValueError for a word of an earlier version."""
    content = OmegaConf.from_dotlist([text])
    today = _renewed(schema, content)
    if today is not content:
        words = flatten(OmegaConf.to_container(today)).items()
        remedy = " ".join(f"{key}={value}" for key, value in words)
        raise ValueError(f"'{text}' is of an earlier version; say {remedy}")
    return content


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
    flat = {}
    for key, sub in tree.items():
        flat |= flatten(sub, f"{prefix}.{key}" if prefix else str(key))
    return flat


def split_arguments(arguments: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits the words of a command line into those that are no key=value, and those that are."""
    arguments = list(arguments)
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def one_folder(arguments: Iterable[str]) -> tuple[str, list[str]]:
    """Run folder and overrides of a later stage. Raises ValueError for no folder, or several."""
    plain, overrides = split_arguments(arguments)
    if len(plain) != 1:
        found = " ".join(plain) or "no folder"
        raise ValueError(f"expected one run folder and key=value words, found {found}")
    return plain[0], overrides


def take_words(words: Iterable[str], defaults: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """Takes key=value words whose keys `defaults` has; returns {key: last value}, other words."""
    words = [word.partition("=") for word in words]
    taken = {key: value for key, _, value in words if key in defaults}
    return defaults | taken, ["".join(word) for word in words if word[0] not in defaults]

"""Configurations by name: cifar10-compact stands for configs/model/cifar10-compact.yaml."""

from collections.abc import Sequence
from pathlib import Path

from base.errors import unknown_word
from base.files import PROJECT

CONFIGS = PROJECT / "configs"


def known_names(*kinds: str) -> list[str]:
    """Names of the YAMLs in these folders of configs."""
    return [path.stem for kind in kinds for path in sorted((CONFIGS / kind).glob("*.yaml"))]


def find_yaml(word: str | Path, kinds: Sequence[str]) -> str:
    """Path of a configuration: of a file that is named by its path, from here or from the project,
    or by its name alone, looked for in the folders `kinds` of configs in turn. Raises ValueError
    for a name that is in none of them; a path is left to its reader."""
    path = Path(word).expanduser()
    if path.is_file():
        return str(path)
    if path.suffix != ".yaml" and len(path.parts) == 1:
        for place in (CONFIGS / kind / f"{path}.yaml" for kind in kinds):
            if place.is_file():
                return str(place)
        listed = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
        complaint = f"no {listed} is called '{path}'"
        raise ValueError(unknown_word(complaint, str(path), known_names(*kinds)))
    return str(PROJECT / path if (PROJECT / path).is_file() else path)

"""Evaluated runs, from their folders or from results files.

A results file is JSON Lines, a line a run: `{"run": "MODEL/NAME", "recipe": ..., "metrics": ...,
"stages": [...]}`, the contents of config.yaml, metrics.json and stages.jsonl, and `cost`, that of
cost.json, where `tinydm benchmark calibration` has left one. What metrics.json repeats of the
recipe is left out of the line and put back when it is read."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from base.config import read_yaml
from base.errors import unknown_word
from base.files import read_lines, write_text
from tinydm.identity import SCORED_BY
from tinydm.recipe import RunConfig

# keys of metrics["protocol"]["asked"] -> keys of the recipe that say the same
REPEATED = {"model": "name"} | {key: key for key in SCORED_BY}


@dataclass
class Result:
    """An evaluated run: its name, MODEL/FOLDER, what its files hold, and where they are, if so."""

    name: str
    recipe: dict[str, Any]
    metrics: dict[str, Any]
    stages: list[dict[str, Any]] = field(default_factory=list)
    folder: Path | None = None
    cost: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.folder or self.name)

    @property
    def config(self) -> RunConfig:
        return config_of(self.recipe)


def config_of(recipe: dict[str, Any]) -> RunConfig:
    """The recipe that a config.yaml of any version holds, with today's defaults for keys that it
    lacks. Raises ValueError for an unknown key."""
    return _build(RunConfig, RunConfig.renewed(recipe))


def _build(schema, values):
    """A dataclass from nested dicts that `base.config` checked before: far faster than `load`."""
    types = get_type_hints(schema)
    found = {}
    for key, value in values.items():
        if key not in types:
            raise ValueError(unknown_word(f"unknown key '{key}' in a recipe", key, types))
        found[key] = _build(types[key], value) if is_dataclass(types[key]) else value
    return schema(**found)


def read_run(folder: Path | str) -> Result:
    """Reads an evaluated run folder. Raises ValueError for scores of an earlier version."""
    folder = Path(folder)
    metrics = json.loads((folder / "metrics.json").read_text())
    if "bit_operations" not in metrics:
        raise ValueError(
            f"{folder}/metrics.json has no bit operations, an earlier version made it; make it "
            f"again with: python scripts/evaluate.py {folder} force=true"
        )
    recipe = read_recipe(folder)
    stages, place = read_lines(folder / "stages.jsonl"), folder.resolve()
    path = folder / "cost.json"
    cost = json.loads(path.read_text()) if path.exists() else {}
    return Result(f"{place.parent.name}/{place.name}", recipe, metrics, stages, folder, cost)


def read_recipe(folder: Path | str) -> dict[str, Any]:
    """Reads the config.yaml of a run folder."""
    return OmegaConf.to_container(read_yaml(Path(folder) / "config.yaml"))


def read_results(path: Path | str) -> list[Result]:
    """Reads a results file. Raises ValueError for a line that is none."""
    found = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            content = json.loads(line)
            metrics, recipe = content["metrics"], content["recipe"]
            asked = metrics["protocol"].setdefault("asked", {})
        except (ValueError, KeyError, TypeError) as error:
            remedy = "take the file from version control or write it again"
            raise ValueError(f"{path}, line {number} is no run ({error!r}); {remedy}") from None
        if not asked.keys() & REPEATED.keys():
            metrics["protocol"]["asked"] = _repeated(recipe) | asked
        result = Result(content["run"], recipe, metrics, content["stages"])
        result.cost = content.get("cost", {})
        found.append(result)
    return found


def results_text(results: Iterable[Result]) -> str:
    """The content of a results file, sorted by the names of the runs."""
    ordered = sorted(results, key=lambda result: result.name)
    return "".join(json.dumps(_line(r), separators=(",", ":")) + "\n" for r in ordered)


def _line(result):
    protocol, repeated = result.metrics["protocol"], _repeated(result.recipe)
    asked = protocol["asked"]
    if {key: value for key, value in asked.items() if key in REPEATED} == repeated:
        asked = {key: value for key, value in asked.items() if key not in REPEATED}
    return {
        "run": result.name,
        "recipe": result.recipe,
        "metrics": result.metrics | {"protocol": protocol | {"asked": asked}},
        "stages": result.stages,
        **({"cost": result.cost} if result.cost else {}),
    }


def _repeated(recipe):
    return {key: recipe[of] for key, of in REPEATED.items() if of in recipe}


def merge_results(path: Path | str, results: Iterable[Result]) -> int:
    """Adds runs to a results file, in the place of those of the same names; returns its length."""
    earlier = read_results(path) if Path(path).exists() else []
    merged = {result.name: result for result in [*earlier, *results]}
    write_text(path, results_text(merged.values()))
    return len(merged)

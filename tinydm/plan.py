"""A comparison's YAML and the runs that follow from it, checked before any work begins."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from base.config import read_yaml, split_arguments
from base.files import PROJECT
from models.diffusion import find_checkpoint
from tinydm.identity import IMAGES, TRAJECTORIES, differences, identity, select
from tinydm.names import find_yaml
from tinydm.recipe import RunConfig, check, load_recipe
from tinydm.report.results import Result, config_of, read_recipe, read_results


@dataclass
class CompareConfig:
    """What is compared. Names are those of configs; a path ends in .yaml. Every variant makes rows
    of its own of each model, bits and method, with what it says merged over these."""

    models: list[str] = field(default_factory=list)  # names of configs/model
    bits: list[str] = field(default_factory=list)  # names of configs/bits
    methods: list[str] = field(default_factory=list)  # names of configs/method
    # {name: [key=value, or a name of configs/method or configs/preset, ...]}
    variants: Any = None
    # of the calibration data and of all else but the images
    seeds: list[int] = field(default_factory=lambda: [1000])
    preset: str = "demo"  # name of configs/preset
    overrides: list[str] = field(default_factory=list)  # key=value of every run
    # results file, as results/equal.jsonl: its runs of the same recipes are not made again
    known: str = ""
    out: str = "runs/compare"  # folder of the runs, tables and figure
    # local | slurm: every run is a job of the library submitit; without it, as long as jobs is 1,
    # they are made in turn
    launcher: str = ""
    jobs: int = 1  # runs that are made at a time
    # of launcher=slurm, by submitit's names, as {partition: gpu, gpus_per_node: 1, timeout_min: 60}
    slurm: dict[str, Any] = field(default_factory=dict)

    @property
    def launches_by(self) -> str:
        """The launcher, "" for none: several runs at a time want one."""
        return self.launcher or ("local" if self.jobs > 1 else "")


@dataclass
class Cell:
    """One run: its folder, the words of calibrate.py that make it, the resolved recipe, the result
    if a results file has it, and what kept it from its numbers."""

    folder: Path
    arguments: list[str]
    config: RunConfig
    known: Result | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """MODEL/FOLDER, as results files call it."""
        return f"{self.folder.parent.name}/{self.folder.name}"


def cells_of(plan: CompareConfig) -> list[Cell]:
    """Every run of a plan, checked. Raises ValueError before any work begins."""
    for key in ("models", "bits", "methods", "seeds"):
        if not getattr(plan, key):
            raise ValueError(f"nothing to compare: {key} is empty; list at least one")
    _check_variants(plan.variants)
    variants = plan.variants or {"": []}
    cells = [
        _cell_of(plan, model, bits, method, seed, str(name), words)
        for model in plan.models
        for bits in plan.bits
        for method in plan.methods
        for name, words in variants.items()
        for seed in plan.seeds
    ]
    _check_names(plan.methods)
    _check_recipes(cells)
    known = {result.name: result for result in read_results(plan.known)} if plan.known else {}
    for cell in cells:
        result = known.get(cell.name)
        if result and _is_of(cell, result.config, result.metrics):
            cell.known = result
    return cells


def _check_variants(variants):
    """Raises ValueError for what is no list of words, or has a name that a folder cannot have."""
    if not isinstance(variants or {}, dict):
        example = "{quad: [calibration.builder=quad]}"
        raise ValueError(f"variants must be a mapping such as {example}; found {variants}")
    for name, words in (variants or {}).items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            complaint = f"variant '{name}' cannot be part of a folder's name"
            raise ValueError(f"{complaint}; use letters, digits, '.', '_', '-'")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"variant '{name}' must be a list of key=value or names of configs/method or "
                f"configs/preset; found {words}"
            )


def _check_names(methods):
    """Raises ValueError where two methods have one name in the tables."""
    called = {}
    for method in methods:
        name = read_yaml(yaml_path("method", method)).get("method")
        if called.setdefault(name, method) != method:
            raise ValueError(
                f"{called[name]} and {method} are both called '{name}', which the rows go by; "
                "give each a method: of its own"
            )


def _check_recipes(cells):
    """Raises ValueError where two runs would be the same."""
    by_recipe = {}
    for cell in cells:
        recipe = json.dumps(identity(cell.config), sort_keys=True)
        other = by_recipe.setdefault(recipe, cell)
        if other is not cell:
            both = f"{other.folder.name} and {cell.folder.name}"
            raise ValueError(f"{both} are the same recipe; leave one out")


def _cell_of(plan, model, bits, method, seed, variant, words):
    names, changes = split_arguments(words)
    own = [find_yaml(name, ("method", "preset")) for name in names]
    presets = [file for file in own if "preset" in read_yaml(file)]
    methods = [file for file in own if file not in presets]
    # a variant's method stands in the row's place, its preset goes on top of the comparison's
    kinds = ("model", model), ("bits", bits), *(("method", name) for name in methods or [method])
    files = [yaml_path(kind, name) for kind, name in (*kinds, ("preset", plan.preset))] + presets
    folder = Path(plan.out) / Path(model).stem / run_name(method, bits, variant, seed)
    words = [
        *plan.overrides,
        *changes,
        f"calibration.seed={seed}",
        f"seed={seed}",
        f"out={folder}",
        *([f"variant={variant}"] if variant else []),
    ]
    config = load_recipe(files, words)
    check(config)
    return Cell(folder, [*files, *words], config)


def run_name(method: str, bits: str, variant: str, seed: int) -> str:
    """Name of a run's folder: METHOD-BITS[-VARIANT]-SEED."""
    parts = Path(method).stem, Path(bits).stem, variant, str(seed)
    return "-".join(part for part in parts if part)


def yaml_path(kind: str, name: str) -> str:
    return name if name.endswith(".yaml") else str(PROJECT / "configs" / kind / f"{name}.yaml")


def absent(config: RunConfig, words: str) -> str:
    """ "" or what a model needs before it can be run by a comparison of these words."""
    try:
        find_checkpoint(asdict(config))
        return ""
    except ValueError:
        how = "put it there and run:"
        if config.download:
            how = f"fill this row with: {config.download} &&"
        return f"needs {config.checkpoint}; {how} python scripts/compare.py {words}"


def is_finished(cell: Cell) -> bool:
    """Whether the run folder, or the known results, hold the scores of this very recipe."""
    path = cell.folder / "metrics.json"
    if cell.known or not path.exists():
        return bool(cell.known)
    return _is_of(cell, config_of(read_recipe(cell.folder)), json.loads(path.read_text()))


def _is_of(cell, config, metrics):
    """Whether scores are those that a cell asks for."""
    asked, wanted = metrics["protocol"]["asked"], asdict(cell.config)
    same = all(asked[key] == wanted[key] for key in ("sampling", "evaluation"))
    return same and not differences(config, cell.config)


def shared_by(cell: Cell, what: Sequence[str] = (IMAGES, TRAJECTORIES)) -> tuple:
    """What is equal in runs of the same full-precision images and trajectories, or only `what`."""
    decisive = json.dumps(select(asdict(cell.config), what), sort_keys=True)
    return cell.folder.parent, cell.config.sampling.num, decisive

"""The run folder: what is done in it, and how a folder of another recipe is refused."""

import importlib.metadata
import os
import resource
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from base.config import load
from base.devices import exact_arithmetic, resolve_device
from base.files import PROJECT, alone, read_lines, write_lines, write_text
from base.workers import count, first_only
from ddim.schedule import make_schedule
from models.diffusion import DiffusionModel, load_model
from tinydm.identity import differences, recipe_of
from tinydm.recipe import RunConfig, check, load_recipe

# of provenance, what holds for all of a run: its files, what decided effort.dtype
KEPT = "files", "trial"
# files that a run is continued from
CONTINUED = ("calibration.safetensors", "resume", "quantized.safetensors")


class Run:
    """An open run folder: its recipe and paths; the model is loaded when first asked for."""

    def __init__(self, config: RunConfig, model: DiffusionModel | None = None) -> None:
        self.config, self.folder = config, Path(config.out)
        self._model = model

    @property
    def model(self) -> DiffusionModel:
        """The full-precision model. Raises ValueError where the folder was made with others."""
        if self._model is None:
            self._model = load_model(asdict(self.config), device=resolve_device(self.config.device))
        known, found = self.config.provenance.get("weights_hash"), self._model.weights_hash
        if known and known != found:
            raise ValueError(
                f"{self.folder} was made with other weights of {self.config.name} (hash "
                f"{known[:12]}, the checkpoint now has {found[:12]}); use another out= folder"
            )
        return self._model

    @property
    def num_evaluations(self) -> int:
        """How often the sampler runs the network for a batch."""
        return self.config.sampling.num_evaluations(make_schedule(**self.config.schedule))

    def path(self, name: str) -> Path:
        return self.folder / name

    def need(self, name: str, maker: str) -> Path:
        """Returns the path of an artefact that another stage makes. Raises ValueError that names
        the command if it is absent. A recipe without passes is that of a training."""
        path = self.path(name)
        if not path.exists():
            trained = maker in ("calibrate", "quantize") and not self.config.passes
            command = "train.py (as before) out=" if trained else f"{maker}.py "
            remedy = f"make it with: python scripts/{command}{self.folder}"
            raise ValueError(f"{path} does not exist yet; {remedy}")
        return path

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Computes exactly while inside, with `threads` threads, and notes the time and the most
        memory of the stage, of several workers those of the first. Unless forced, the seconds of
        earlier calls are added to its own."""
        started = time.monotonic(), time.process_time()
        try:
            with exact_arithmetic(self.config.threads):
                yield
        finally:  # interrupted or not; only a kill goes uncounted
            seconds, of_cpu = time.monotonic() - started[0], time.process_time() - started[1]
            spent = {"seconds": round(seconds, 2), "cpu_seconds": round(of_cpu, 2)}
            spent |= peak_memory() | ({"workers": count()} if count() > 1 else {})
            self.note(name, spent)

    @first_only
    def note(self, name: str, spent: dict[str, Any]) -> None:
        """Adds what a stage spent to stages.jsonl."""
        with alone(self.folder):
            self._note(name, spent)

    def _note(self, name, spent):
        path = self.path("stages.jsonl")
        rows = read_lines(path)
        for earlier in (row for row in rows if row["stage"] == name and not self.config.force):
            for key in (key for key in earlier if key.startswith("peak")):
                spent[key] = max(earlier[key], spent.get(key, 0))
            for key in ("seconds", "cpu_seconds"):  # an earlier version noted seconds alone
                spent[key] = round(spent[key] + earlier.get(key, 0), 2)
        rows = [row for row in rows if row["stage"] != name]
        write_lines(path, [*rows, {"stage": name, **spent}])

    @first_only
    def begin(self) -> None:
        """Notes versions and commit anew where numbers are made, as a run may be continued with
        later ones; drops what an earlier quantized network left, which `force` replaces."""
        kept = {key: self.config.provenance[key] for key in KEPT if key in self.config.provenance}
        self.config.provenance = provenance(self.model, [], self.config.threads) | kept
        write_config(self)
        shutil.rmtree(self.path("samples"), ignore_errors=True)
        for name in ("quantized.safetensors", "dynamic.safetensors", "samples.npz", "metrics.json"):
            self.path(name).unlink(missing_ok=True)

    @first_only
    def finish(self, name: str) -> None:
        """Drops what a finished stage kept in order to continue."""
        shutil.rmtree(self.path(f"resume/{name}"), ignore_errors=True)
        with suppress(OSError):
            self.path("resume").rmdir()

    def recipe(self, rules: list[dict[str, Any]]) -> dict[str, Any]:
        """Returns what a network that was converted by `rules` is stored with."""
        return recipe_of(self.config, self.model.weights_hash, rules)


def create(files: Iterable[Path | str], overrides: Iterable[str]) -> Run:
    """Makes a run folder for these files, or opens it. Raises ValueError for another recipe."""
    return claim(load_recipe(files, overrides), files)


def claim(
    config: RunConfig, files: Iterable[Path | str], model: DiffusionModel | None = None
) -> Run:
    """Does the same for a recipe that was read from `files` and a model that is loaded already."""
    check(config)
    run = Run(config, model)
    if any(map(os.path.exists, map(run.path, CONTINUED))):
        return reopen(config, model)
    if run.path("metrics.json").exists():
        reopen(config, model)  # scores alone: nothing to go on from, but to refuse
    config.provenance = provenance(run.model, files, config.threads)
    write_config(run)
    return run


def open_run(folder: Path | str, overrides: Iterable[str] = ()) -> Run:
    """Opens an existing run folder; `overrides` may change only what decides nothing."""
    saved = Path(folder) / "config.yaml"
    if not saved.exists():
        raise ValueError(
            f"{folder} is no run folder (it has no config.yaml); begin with: python "
            "scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml "
            f"configs/method/METHOD.yaml out={folder}"
        )
    return reopen(load(RunConfig, [saved], [*overrides, f"out={folder}"]))


def reopen(config: RunConfig, model: DiffusionModel | None = None) -> Run:
    """Opens the folder of a recipe, which is there. Raises ValueError if it has another recipe."""
    check(config)
    run = Run(config, model)
    before = load(RunConfig, [run.path("config.yaml")])
    changed = differences(before, config)
    if changed:
        more = " and more" if len(changed) > 4 else ""
        raise ValueError(
            f"{run.folder} belongs to another recipe: {'; '.join(changed[:4])}{more}; choose "
            "another out= folder, or delete that one"
        )
    config.provenance = before.provenance
    if asdict(before) | {"force": False} != asdict(config) | {"force": False}:
        write_config(run)
    return run


@first_only
def write_config(run: Run) -> None:
    """Writes the recipe into the folder."""
    text = OmegaConf.to_yaml(OmegaConf.create(asdict(run.config) | {"force": False}))
    with alone(run.folder):
        write_text(run.path("config.yaml"), text)


def provenance(
    model: DiffusionModel, files: Iterable[Path | str], threads: int = 0
) -> dict[str, Any]:
    """Returns versions, commit and hashes that a number depends on; 0 `threads`: the process's."""
    files = [str(Path(file).resolve()) for file in files if file]
    packages = ("torch", "torchvision", "numpy", "safetensors", "torch-fidelity", "torchmetrics")
    is_cuda = model.device.type == "cuda"
    return {
        "weights_hash": model.weights_hash,
        "commit": _commit(),
        "files": [file.removeprefix(f"{PROJECT}{os.sep}") for file in files],
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "threads": threads or torch.get_num_threads(),
    }


def _commit():
    command = ["git", "describe", "--always", "--dirty"]
    try:
        out = subprocess.check_output(command, cwd=PROJECT, text=True, stderr=subprocess.DEVNULL)
        return out.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory() -> dict[str, int]:
    """Returns the most bytes that this process held so far: resident, and of a GPU in use."""
    # Linux counts KiB
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_initialized():
        devices = range(torch.cuda.device_count())
        peak["peak_cuda_bytes"] = max(map(torch.cuda.max_memory_allocated, devices))
    return peak

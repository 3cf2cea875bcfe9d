"""The run folder: what is done in it, and how a stage refuses a folder that belongs to another
recipe."""

import hashlib
import importlib.metadata
import json
import resource
import shutil
import subprocess
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import torch
from omegaconf import OmegaConf

from base.config import load
from base.devices import resolve_device
from base.files import PROJECT, alone, write_text
from ddim.sampler import num_evaluations
from ddim.schedule import make_schedule, step_sequence
from models.diffusion import load_model
from tinydm.recipe import RunConfig, check, differences, load_recipe


class Run:
    """An open run folder: `config` (RunConfig) and paths; the model is loaded when first asked
    for."""

    def __init__(self, config):
        self.config, self.folder = config, Path(config.out)
        if config.threads:
            torch.set_num_threads(config.threads)
        self._model = None

    @property
    def model(self):
        if self._model is None:
            self._model = load_model(asdict(self.config), device=resolve_device(self.config.device))
            known = self.config.provenance.get("weights_hash")
            if known and known != self._model.weights_hash:
                raise ValueError(
                    f"{self.folder} was made with other weights of {self.config.name} (hash "
                    f"{known[:12]}, "
                    f"the checkpoint now has {self._model.weights_hash[:12]}); use another out= "
                    "folder"
                )
        return self._model

    @property
    def num_evaluations(self):
        """How often the sampler runs the network for a batch."""
        s = self.config.sampling
        return num_evaluations(
            s.sampler, step_sequence(s.skip, s.steps, make_schedule(**self.config.schedule))
        )

    def path(self, name):
        return self.folder / name

    def need(self, name, maker):
        """Path of an artefact that another stage makes; ValueError that names the command if it is
        absent. A recipe without passes is that of a training."""
        if not self.path(name).exists():
            trained = maker in ("calibrate", "quantize") and not self.config.passes
            command = "train.py (as before) out=" if trained else f"{maker}.py "
            raise ValueError(
                f"{self.path(name)} does not exist yet; make it with: python "
                f"scripts/{command}{self.folder}"
            )
        return self.path(name)

    @contextmanager
    def stage(self, name):
        """Time a stage, with the most memory it held. Unless forced it goes on from earlier calls,
        whose seconds are added to its own."""
        started = time.monotonic()
        try:
            yield
        # interrupted or not; only a kill goes uncounted
        finally:
            spent = {"seconds": round(time.monotonic() - started, 2), **peak_memory()}
            with alone(self.folder):
                self.note(name, spent)

    def note(self, name, spent):
        path = self.path("stages.jsonl")
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for earlier in (row for row in rows if row["stage"] == name and not self.config.force):
            peaks = {
                key: max(value, spent.get(key, 0))
                for key, value in earlier.items()
                if key.startswith("peak")
            }
            spent |= peaks | {"seconds": round(spent["seconds"] + earlier["seconds"], 2)}
        rows = [*(row for row in rows if row["stage"] != name), {"stage": name, **spent}]
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))

    def begin(self):
        """Note versions and commit anew where numbers are made, as a run may be continued with
        later ones; drop what an earlier quantized network left, which `force` replaces."""
        files = {"files": self.config.provenance.get("files", [])}
        self.config.provenance = provenance(self.model, []) | files
        write_config(self)
        shutil.rmtree(self.path("samples"), ignore_errors=True)
        for name in ("quantized.safetensors", "dynamic.safetensors", "samples.npz", "metrics.json"):
            self.path(name).unlink(missing_ok=True)

    def finish(self, name):
        """Drop what a finished stage kept in order to continue."""
        shutil.rmtree(self.path(f"resume/{name}"), ignore_errors=True)
        with suppress(OSError):
            self.path("resume").rmdir()

    def recipe(self):
        """What identifies a quantized network: everything that changes its numbers, without what
        only moves it."""
        keep = (
            "name",
            "network",
            "schedule",
            "guidance",
            "bits",
            "method",
            "segments",
            "rules",
            "preset",
            "effort",
            "calibration",
            "seed",
        )
        everything = asdict(self.config)
        return {k: everything[k] for k in keep} | {
            "passes": self.config.all_passes,
            "weights_hash": self.model.weights_hash,
        }


def facts_of_images(run):
    """What decides the bytes of full-precision images and trajectories, beside seeds and counts."""
    c = run.config
    prompts = Path(c.sampling.prompts)
    return {k: v for k, v in asdict(c.sampling).items() if k not in ("num", "seed", "prompts")} | {
        "weights": run.model.weights_hash,
        "device": run.model.device.type,
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts.is_file() else "",
        **{
            key: asdict(c)[key]
            for key in (
                "network",
                "first_stage",
                "cond_stage",
                "scale_factor",
                "schedule",
                "guidance",
            )
        },
    }


def create(files, overrides):
    """A new run folder for these files, or the one that is there if it has the same recipe."""
    config = load_recipe(files, overrides)
    check(config)
    saved = Path(config.out) / "config.yaml"
    run = Run(config)
    if any(
        run.path(name).exists()
        for name in ("calibration.safetensors", "resume", "quantized.safetensors")
    ):
        return _reopen(saved, config)
    if run.path("metrics.json").exists():
        # scores alone: nothing to go on from, but to refuse
        _reopen(saved, config)
    config.provenance = provenance(run.model, files)
    write_config(run)
    return run


def open_run(folder, overrides=()):
    """An existing run folder; `overrides` may change only what changes no artefact."""
    saved = Path(folder) / "config.yaml"
    if not saved.exists():
        raise ValueError(
            f"{folder} is no run folder (it has no config.yaml); begin with: python "
            "scripts/calibrate.py "
            "configs/model/MODEL.yaml configs/bits/BITS.yaml configs/method/METHOD.yaml "
            f"out={folder}"
        )
    return _reopen(saved, load(RunConfig, [saved], [*overrides, f"out={folder}"]))


def _reopen(saved, config):
    check(config)
    before = load(RunConfig, [saved])
    changed = differences(before, config)
    if changed:
        raise ValueError(
            f"{saved.parent} belongs to another recipe: {'; '.join(changed[:4])}"
            f"{' and more' if len(changed) > 4 else ''}; choose another out= folder, or "
            "delete that one"
        )
    config.provenance = before.provenance
    run = Run(config)
    if asdict(before) | {"force": False} != asdict(config) | {"force": False}:
        write_config(run)
    return run


def write_config(run):
    with alone(run.folder):
        write_text(
            run.path("config.yaml"),
            OmegaConf.to_yaml(OmegaConf.create(asdict(run.config) | {"force": False})),
        )


def provenance(model, files):
    """Versions, commit and hashes that a number depends on."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    packages = ("torch", "torchvision", "numpy", "safetensors", "torch-fidelity", "torchmetrics")
    paths = [Path(file).resolve() for file in files]
    own = [
        str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path) for path in paths
    ]
    return {
        "weights_hash": model.weights_hash,
        "commit": commit,
        "files": own,
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "device": torch.cuda.get_device_name(model.device)
        if model.device.type == "cuda"
        else "cpu",
        "threads": torch.get_num_threads(),
    }


def peak_memory():
    """The most memory that this process held so far, in bytes: resident, and of the GPU where one
    was used."""
    # Linux counts KiB
    peak = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    if torch.cuda.is_initialized():
        peak["peak_cuda_bytes"] = max(
            map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))
        )
    return peak

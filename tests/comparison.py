"""What the tests of comparisons share: model YAMLs, stages inside the test's process, a plan."""

import csv
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pipeline import NETWORK, WORDS
from safetensors.torch import save_file

from models.zoo import build_network
from tinydm import compare

REAL_RUN = subprocess.run


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model YAMLs: tiny with random weights, broken with NaN weights, absent without."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    state = build_network(**NETWORK).state_dict()
    save_file(state, folder / "tiny.safetensors")
    save_file(
        state | {"conv_in.bias": torch.full((8,), float("nan"))}, folder / "broken.safetensors"
    )
    for name in ("tiny", "broken", "absent"):
        facts = {
            "name": name,
            "network": NETWORK,
            "checkpoint": str(folder / f"{name}.safetensors"),
            "schedule": {"kind": "linear", "timesteps": 1000},
            "sampling": {"skip": "uniform"},
            "download": f"bash scripts/download_models.sh {name}",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(facts))
    return folder


@pytest.fixture
def stages(monkeypatch):
    """Stages run inside the test's process instead of their own; the list of those that ran."""
    ran = []
    monkeypatch.setattr(subprocess, "run", partial(run_here, ran))
    return ran


def run_here(ran, command, *rest, stdout=None, **options):
    """In place of subprocess.run: a stage inside this process, noted in `ran`."""
    if command[0] != sys.executable:
        return REAL_RUN(command, *rest, stdout=stdout, **options)
    script, arguments = Path(command[1]).stem, [str(word) for word in command[2:]]
    ran.append((script, *arguments))
    try:
        import_module(f"tinydm.stages.{script}").run(arguments)
    except ValueError as error:
        stdout.write(f"error: {error}\n".encode())
        return SimpleNamespace(returncode=2)
    return SimpleNamespace(returncode=0)


def make_in_job(*arguments):
    """In place of tinydm.compare's in jobs, which saves the start of a process a stage."""
    subprocess.run = partial(run_here, [])
    return compare.make_in_job(*arguments)


def plan_file(models, out, names=("tiny",), **more):
    facts = {
        "models": [str(models / f"{name}.yaml") for name in names],
        "bits": ["w4a8"],
        "methods": ["minmax"],
        "seeds": [1, 2],
        "overrides": WORDS,
        "out": str(out),
    } | more
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(facts))
    return str(path)


def csv_rows(out):
    return list(csv.DictReader((out / "table.csv").open()))

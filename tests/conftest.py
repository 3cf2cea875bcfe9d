"""What the tests share: recorded fixtures, a tiny network, a tiny model on disk, comparison in
words."""

import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.diffusion import load_model
from models.zoo import build_network

pytest_plugins = ["pipeline", "calibration_runs", "comparison", "corrections", "written_passes"]
FIXTURES = Path(__file__).parent / "fixtures"
# public ones: shapes
CHECKPOINTS = json.loads(gzip.decompress((FIXTURES / "ddim_checkpoints.json.gz").read_bytes()))
TINY = {
    "family": "ddim-unet",
    "image_size": 8,
    "ch": 8,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
    "norm_groups": 4,
}


def read_fixture(name):
    """-> meta, weights, tensors of tests/fixtures/NAME.npz; a weight is stored as integers times a
    power of two."""
    content = np.load(FIXTURES / f"{name}.npz")
    meta, weights, tensors = json.loads(str(content["meta"])), {}, {}
    for key in content.files:
        if key == "meta":
            continue
        value = torch.from_numpy(content[key])
        if key in meta["exponents"]:
            weights[key] = value.float() * 2.0 ** meta["exponents"][key]
        else:
            tensors[key] = value
    return meta, weights, tensors


def below(prefix, tensors):
    """The entries whose names begin with `prefix`, without it."""
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def deviation(found, expected):
    """max|found - expected| / max|expected|."""
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def assert_close(found, expected, tolerance):
    assert deviation(found, expected) <= tolerance, (
        f"deviates by {deviation(found, expected):.1e} of its largest value"
    )


def randomize(net, seed=0):
    """Every parameter from a seeded normal law, the layers that training starts at zero included;
    returns `net`."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in net.named_parameters():
        noise = torch.randn(value.shape, generator=rng)
        centre = 1 if "norm" in name and name.endswith("weight") else 0
        value.data = noise / value[0].numel() ** 0.5 if value.dim() > 1 else centre + 0.1 * noise
    return net


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """What tests write need not outlast the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session")
def glue_cache(tmp_path_factory):
    """Where the glue that tests compile is kept, for all workers of the session."""
    own = tmp_path_factory.getbasetemp()
    return str((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "glue")


@pytest.fixture
def tiny_net():
    return randomize(build_network(**TINY)).eval()


@pytest.fixture
def tiny_config(tiny_net, tmp_path):
    """A model YAML's content with its checkpoint on disk: a 3 x 8 x 8 model of 20 thousand
    parameters."""
    save_file(tiny_net.state_dict(), tmp_path / "tiny.safetensors")
    return {
        "name": "tiny",
        "network": TINY,
        "checkpoint": str(tmp_path / "tiny.safetensors"),
        "schedule": {},
        "sampling": {"sampler": "ddim", "steps": 5, "skip": "uniform", "eta": 0.0},
    }


@pytest.fixture
def tiny_model(tiny_config):
    return load_model(tiny_config, device="cpu")

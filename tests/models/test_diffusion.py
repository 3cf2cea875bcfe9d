"""A model from its YAML: what it holds, where its checkpoint is found, and its own sampling."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, TINY, deviation
from omegaconf import OmegaConf

from base.config import read_yaml
from ddim.sampler import SAMPLERS
from models import diffusion
from models.diffusion import find_checkpoint, load_model
from models.sampling import Sampling, sample
from models.weights import state_hash

MODELS = Path(diffusion.PROJECT) / "configs/model"


def test_a_loaded_model_is_ready_to_use(tiny_model, tiny_net):
    assert not tiny_model.net.training and not any(
        p.requires_grad for p in tiny_model.net.parameters()
    )
    assert tiny_model.shape == (3, 8, 8) and tiny_model.schedule.num_timesteps == 1000
    assert tiny_model.weights_hash == state_hash(tiny_net)
    assert tiny_model.float_bytes == 4 * sum(p.numel() for p in tiny_net.parameters())
    assert tiny_model.labels(0, range(3)) is None
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0])
    assert torch.equal(tiny_model.eps(x, t), tiny_net(x, t))


def test_decode_rounds_to_the_nearest_grey_level(tiny_model):
    grey = torch.arange(256.0).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    decoded = tiny_model.decode(grey / 127.5 - 1)
    assert decoded.dtype == torch.uint8 and torch.equal(decoded.float(), grey)
    assert tiny_model.decode(torch.tensor([-7.0, -1.0, 0.0, 0.003, 1.0, 7.0])).tolist() == [
        0,
        0,
        128,
        128,
        255,
        255,
    ]


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_model_yaml_builds_its_network(path):
    config = OmegaConf.to_container(read_yaml(path))
    assert config["name"] == path.stem
    with torch.device("meta"):
        net = diffusion.build_network(**config["network"])
    diffusion.make_schedule(**config["schedule"])
    assert config["sampling"]["sampler"] in SAMPLERS
    if path.stem in CHECKPOINTS:
        assert {name: list(value.shape) for name, value in net.state_dict().items()} == CHECKPOINTS[
            path.stem
        ]["shapes"]


def test_checkpoint_is_found_in_the_project_then_in_the_cache(tmp_path, monkeypatch):
    project, cache = tmp_path / "project", tmp_path / "cache"
    monkeypatch.setattr(diffusion, "PROJECT", project)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    config = OmegaConf.to_container(read_yaml(MODELS / "cifar10.yaml"))
    with pytest.raises(ValueError) as error:
        find_checkpoint(config)
    for part in (
        str(project),
        str(cache),
        "bash scripts/download_models.sh cifar10",
        "checkpoint=PATH",
    ):
        assert part in str(error.value)
    below = "diffusion_models_converted/ema_diffusion_cifar10_model/model-790000.ckpt"
    for place in (cache / below, project / "models/checkpoints" / below):
        place.parent.mkdir(parents=True)
        place.touch()
        assert find_checkpoint(config) == place


def test_a_path_of_ones_own_is_not_replaced_by_the_cached_file(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "own.ckpt").touch()
    assert (
        find_checkpoint({"name": "x", "checkpoint": str(tmp_path / "own.ckpt")})
        == tmp_path / "own.ckpt"
    )
    with pytest.raises(ValueError, match="the checkpoint of x is not at"):
        find_checkpoint({"name": "x", "checkpoint": "own.ckpt"})


def test_checkpoint_of_another_network(tiny_config):
    tiny_config["network"] = {**TINY, "ch": 16}
    with pytest.raises(ValueError, match="does not fit the network"):
        load_model(tiny_config, device="cpu")


def test_a_copied_checkpoint_gives_the_same_model(tiny_config, tmp_path, tiny_model):
    copy = shutil.copy(tiny_config["checkpoint"], tmp_path / "copy.safetensors")
    again = load_model({**tiny_config, "checkpoint": str(copy)}, device="cpu")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10.0])
    assert (
        again.weights_hash == tiny_model.weights_hash
        and deviation(again.eps(x, t), tiny_model.eps(x, t)) == 0
    )


def test_a_model_draws_by_its_own_sampling_with_changes_on_top(tiny_model):
    """The sampling of its configuration: 5 uniform steps."""
    own = Sampling(steps=5, skip="uniform")
    assert tiny_model.sampling == own
    assert torch.equal(tiny_model.sample([1, 2]), sample(tiny_model, [1, 2], own))
    changed = replace(own, seed=3, batch_size=2)
    assert torch.equal(
        tiny_model.sample([1, 2], seed=3, batch_size=2), sample(tiny_model, [1, 2], changed)
    )
    with pytest.raises(ValueError, match="load it again with sampling.classes"):
        tiny_model.sample([1], classes=[3])

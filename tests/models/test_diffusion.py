"""A model from its YAML; images that depend on seed and index alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHECKPOINTS, TINY, deviation
from omegaconf import OmegaConf

from base.config import read_yaml
from base.devices import resolve_device
from ddim.sampler import ddim
from ddim.schedule import step_sequence
from models import diffusion
from models.diffusion import find_checkpoint, load_model
from models.sampling import sample
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
    assert config["sampling"]["sampler"] in diffusion.SAMPLERS
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


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' was asked for, but PyTorch sees 0 CUDA devices"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="'gpu' is unknown; choose auto, cpu"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' was asked for"):
        resolve_device("cuda:2")


def draw(model, indices, **options):
    return sample(model, model.eps, indices, **{"steps": 5, "seed": 3, **options})


def test_sample_is_the_sampler_on_the_noise_of_the_images(tiny_model):
    steps = step_sequence("quad", 5, tiny_model.schedule)
    x = ddim(
        tiny_model.net,
        tiny_model.noise(3, [4, 9]).draw(),
        steps,
        tiny_model.schedule,
        noise=lambda: 0.0,
    )
    assert torch.equal(draw(tiny_model, [4, 9], skip="quad"), tiny_model.decode(x))


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)])
def test_an_image_has_the_same_bytes_whatever_is_drawn_with_it(tiny_model, sampler, eta):
    options = {"sampler": sampler, "eta": eta, "batch_size": 7}
    whole = draw(tiny_model, range(7, 14), **options)
    for indices in ([7], [13], [9, 12], [12, 9], range(10, 14)):
        assert torch.equal(draw(tiny_model, indices, **options), whole[[i - 7 for i in indices]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, draw(tiny_model, range(7, 14), **options | {"seed": 4}))


def test_batch_size_changes_at_most_one_grey_level(tiny_model):
    whole = draw(tiny_model, range(8), batch_size=8).int()
    for batch_size in (1, 2, 3, 5):
        parts = [draw(tiny_model, [i], batch_size=batch_size) for i in range(8)]
        assert (torch.cat(parts).int() - whole).abs().max() <= 1


def test_callback_sees_every_step_and_cond_reaches_eps(tiny_model, monkeypatch):
    monkeypatch.setattr(
        tiny_model, "labels", lambda seed, indices: torch.tensor([seed + i for i in indices])
    )
    conds, steps = [], []

    def eps(x, t, cond):
        conds.append(cond.tolist())
        return tiny_model.net(x, t)

    sample(
        tiny_model,
        eps,
        [1, 2],
        steps=4,
        seed=10,
        callback=lambda step, t, *_: steps.append((step, t)),
    )
    assert steps == [(0, 750), (1, 500), (2, 250), (3, 0)] and conds == [[11, 12]] * 4


def test_nan_and_unknown_sampler_end_in_a_sentence(tiny_model):
    with pytest.raises(ValueError, match="NaN or infinite"):
        sample(tiny_model, lambda x, t, cond: x * torch.nan, [0], steps=2)
    with pytest.raises(ValueError, match="'ddimm' is unknown; did you mean 'ddim'"):
        draw(tiny_model, [0], sampler="ddimm")


def test_a_copied_checkpoint_gives_the_same_model(tiny_config, tmp_path, tiny_model):
    copy = shutil.copy(tiny_config["checkpoint"], tmp_path / "copy.safetensors")
    again = load_model({**tiny_config, "checkpoint": str(copy)}, device="cpu")
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([10.0])
    assert (
        again.weights_hash == tiny_model.weights_hash
        and deviation(again.eps(x, t), tiny_model.eps(x, t)) == 0
    )


@pytest.mark.parametrize("isa, native", [("AVX2", False), ("AVX512_CORE_BF16", None)])
def test_bfloat16_is_computed_where_the_processor_has_it(isa, native):
    """In a process of its own: oneDNN reads the variable once. What the machine has itself limits
    the second case."""
    code = (
        "import torch; from models.diffusion import computes_bfloat16 as f; "
        "print(f(torch.device('cpu')), torch.cpu._is_avx512_bf16_supported())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
    )
    found, machine = (word == "True" for word in ended.stdout.split())
    assert ended.returncode == 0 and found == (machine if native is None else native)

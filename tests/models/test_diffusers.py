"""Folders as the diffusers library saves them load into our networks and compute the same."""

import json

import pytest
import torch
from diffusers_names import (
    FIRST,
    LATENT,
    LATENT_FACTS,
    NEW,
    OLD,
    PIXEL,
    PIXEL_FACTS,
    VQ,
    first,
    latent,
    pixel,
)
from safetensors.torch import save_file

from models.checkpoint_files import load_state
from models.weights import load_components, load_weights
from models.zoo import build_network


def saved(folder, state, config, name="diffusion_pytorch_model.safetensors"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    content = {name: value.contiguous() for name, value in state.items()}
    (save_file if name.endswith("safetensors") else torch.save)(content, folder / name)
    return folder


@torch.no_grad()
def same(net, other):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    assert torch.equal(net(x, t), other.eval()(x, t))


@pytest.mark.parametrize("words", [NEW, OLD])
@pytest.mark.parametrize("below", ["", "unet"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_pixel_space(tmp_path, words, below, suffix):
    net, state = pixel(words)
    saved(tmp_path / "model" / below, state, PIXEL_FACTS, f"diffusion_pytorch_model.{suffix}")
    other = build_network(**PIXEL)
    load_components(tmp_path / "model", {"unet": other}, weights="ema")
    same(net, other)


def test_latent_diffusion(tmp_path):
    unet, unet_state = latent()
    stage, stage_state = first()
    saved(tmp_path / "unet", unet_state, LATENT_FACTS)
    saved(tmp_path / "vqvae", stage_state, VQ)
    others = {"unet": build_network(**LATENT), "first_stage": build_network(**FIRST)}
    load_components(tmp_path, others)
    same(unet, others["unet"])
    image = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        z = stage.encode(image)
        assert torch.equal(z, others["first_stage"].eval().encode(image))
        assert torch.equal(stage.decode(z), others["first_stage"].decode(z))


def test_first_stage_alone(tmp_path):
    stage, state = first()
    other = build_network(**FIRST)
    load_components(saved(tmp_path / "vqvae", state, VQ), {"first_stage": other})
    assert all(
        torch.equal(a, b) for a, b in zip(stage.state_dict().values(), other.state_dict().values())
    )


@pytest.mark.parametrize(
    "facts, sentence",
    [
        (
            {"norm_eps": 1e-5},
            "no network here computes: config.json has norm_eps=1e-05 instead of 1e-06",
        ),
        ({"attention_head_dim": 8}, "attention_head_dim=8 instead of None"),
        (
            {"_class_name": "UNet2DConditionModel"},
            "holds a UNet2DConditionModel of diffusers, expected UNet2DModel",
        ),
        ({"block_out_channels": None, "flip_sin_to_cos": True}, "no network here computes"),
    ],
)
def test_another_network_is_refused_by_its_config(tmp_path, facts, sentence):
    with pytest.raises(ValueError) as error:
        load_state(saved(tmp_path / "x", pixel()[1], {**PIXEL_FACTS, **facts}))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(
        ValueError, match="is a folder without config.json and diffusion_pytorch_model.safetensors"
    ):
        load_state(tmp_path)
    folder = saved(tmp_path / "x", pixel()[1], [])
    with pytest.raises(ValueError, match="does not describe a network of diffusers"):
        load_state(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_state(folder)


def test_weights_that_are_unknown_or_missing_are_named(tmp_path):
    state = pixel()[1]
    state["class_embedding.weight"] = state.pop("down_blocks.0.resnets.0.conv1.bias")
    with pytest.raises(
        ValueError,
        match=r"misses 1 \(down.0.block.0.conv1.bias\); it has surplus 1 \(class_embedding",
    ):
        load_weights(
            build_network(**PIXEL), load_state(saved(tmp_path / "x", state, PIXEL_FACTS)), "x"
        )
    state = latent()[1]
    del state["mid_block.attentions.0.to_k.bias"]
    with pytest.raises(
        ValueError, match=r"an attention without all of its weights \(middle_block.1.to_q.bias\)"
    ):
        load_state(saved(tmp_path / "y", state, LATENT_FACTS))

"""A file of weights is recognised by its names."""

import pytest

from models.kinds import compare_kinds


@pytest.mark.parametrize(
    "name, kind",
    {
        "temb.dense.0.weight": "a pixel-space DDIM U-Net",
        "input_blocks.0.0.weight": "a U-Net of latent, improved or",
        "encoder.conv_in.weight": "a first stage",
        "model.diffusion_model.out.0.bias": "a latent-diffusion checkpoint",
        "cond_stage_model.transformer.text_model.x": "a Stable Diffusion",
        "down_blocks.0.resnets.0.norm1.bias": "a network of the diffusers library",
        "conv_in.weight_codes": "a quantized model of this project",
        "stem.0.weight": "an image classifier",
        "fc.weight": "an image classifier",
        "x.y": "of no known kind",
    }.items(),
)
def test_what_a_file_seems_to_be(name, kind):
    assert kind in compare_kinds({"conv_in.bias": 0, name: 0})


def test_a_classifier_beside_a_guided_network():
    assert "a classifier of guided" in compare_kinds(
        {"input_blocks.0.0.weight": 0, "out.2.qkv_proj.weight": 0}
    )

"""Small networks and their weights under the names of the diffusers library, which are written out
by hand here; no published folder was at hand."""

import torch
from conftest import randomize

from models.zoo import build_network

PIXEL = {
    "family": "ddim-unet",
    "image_size": 8,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [4],
}
LATENT = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}
FIRST = {"family": "autoencoder-vq", "embed_dim": 3, "n_embed": 16, "ddconfig": DDCONFIG}

UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "center_input_sample": False,
    "mid_block_scale_factor": 1,
    "time_embedding_type": "positional",
}
PIXEL_FACTS = {
    **UNET,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "attention_head_dim": None,
}
LATENT_FACTS = {
    **UNET,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "attention_head_dim": 16,
}
VQ = {"_class_name": "VQModel", "block_out_channels": [32, 64], "layers_per_block": 1}

# One line per module that has weights: ours, theirs. Attention is filled in by the functions below.
BLOCK = "norm1 conv1 temb_proj:time_emb_proj norm2 conv2 nin_shortcut:conv_shortcut"
PIXEL_BLOCKS = {
    "down.0.block.0": "down_blocks.0.resnets.0",
    "down.1.block.0": "down_blocks.1.resnets.0",
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "up.1.block.0": "up_blocks.0.resnets.0",
    "up.1.block.1": "up_blocks.0.resnets.1",
    "up.0.block.0": "up_blocks.1.resnets.0",
    "up.0.block.1": "up_blocks.1.resnets.1",
}
PIXEL_ATTENTION = {
    "down.1.attn.0": "down_blocks.1.attentions.0",
    "mid.attn_1": "mid_block.attentions.0",
    "up.1.attn.0": "up_blocks.0.attentions.0",
    "up.1.attn.1": "up_blocks.0.attentions.1",
}
PIXEL_REST = {
    "temb.dense.0": "time_embedding.linear_1",
    "temb.dense.1": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "conv_out": "conv_out",
    "norm_out": "conv_norm_out",
    "down.0.downsample.conv": "down_blocks.0.downsamplers.0.conv",
    "up.1.upsample.conv": "up_blocks.0.upsamplers.0.conv",
}

LATENT_BLOCK = (
    "in_layers.0:norm1 in_layers.2:conv1 emb_layers.1:time_emb_proj out_layers.0:norm2 "
    "out_layers.3:conv2 "
    "skip_connection:conv_shortcut"
)
LATENT_BLOCKS = {
    "input_blocks.1.0": "down_blocks.0.resnets.0",
    "input_blocks.3.0": "down_blocks.1.resnets.0",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.2": "mid_block.resnets.1",
    "output_blocks.0.0": "up_blocks.0.resnets.0",
    "output_blocks.1.0": "up_blocks.0.resnets.1",
    "output_blocks.2.0": "up_blocks.1.resnets.0",
    "output_blocks.3.0": "up_blocks.1.resnets.1",
}
LATENT_ATTENTION = {
    "input_blocks.3.1": "down_blocks.1.attentions.0",
    "middle_block.1": "mid_block.attentions.0",
    "output_blocks.0.1": "up_blocks.0.attentions.0",
    "output_blocks.1.1": "up_blocks.0.attentions.1",
}
LATENT_REST = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "input_blocks.2.0.op": "down_blocks.0.downsamplers.0.conv",
    "output_blocks.1.2.conv": "up_blocks.0.upsamplers.0.conv",
}

FIRST_BLOCKS = {
    f"{half}.{ours}": f"{half}.{theirs}"
    for half, names in {
        "encoder": {
            "down.0.block.0": "down_blocks.0.resnets.0",
            "down.1.block.0": "down_blocks.1.resnets.0",
        },
        "decoder": {
            "up.1.block.0": "up_blocks.0.resnets.0",
            "up.1.block.1": "up_blocks.0.resnets.1",
            "up.0.block.0": "up_blocks.1.resnets.0",
            "up.0.block.1": "up_blocks.1.resnets.1",
        },
    }.items()
    for ours, theirs in {
        **names,
        "mid.block_1": "mid_block.resnets.0",
        "mid.block_2": "mid_block.resnets.1",
    }.items()
}
FIRST_ATTENTION = {
    f"{half}.mid.attn_1": f"{half}.mid_block.attentions.0" for half in ("encoder", "decoder")
}
FIRST_REST = {
    "encoder.conv_in": "encoder.conv_in",
    "encoder.norm_out": "encoder.conv_norm_out",
    "encoder.conv_out": "encoder.conv_out",
    "decoder.conv_in": "decoder.conv_in",
    "decoder.norm_out": "decoder.conv_norm_out",
    "decoder.conv_out": "decoder.conv_out",
    "encoder.down.0.downsample.conv": "encoder.down_blocks.0.downsamplers.0.conv",
    "decoder.up.1.upsample.conv": "decoder.up_blocks.0.upsamplers.0.conv",
    **{same: same for same in ("quantize.embedding", "quant_conv", "post_quant_conv")},
}
NEW, OLD = ("to_q", "to_k", "to_v", "to_out.0"), ("query", "key", "value", "proj_attn")


def theirs(net, blocks, parts, attention, rest, words=NEW, head_dim=None):
    """The state dict of `net` under the library's names; every weight of it is used exactly
    once."""
    state, out = dict(net.state_dict()), {}

    def move(ours, name):
        for leaf in ("weight", "bias"):
            if f"{ours}.{leaf}" in state:
                out[f"{name}.{leaf}"] = state.pop(f"{ours}.{leaf}")

    for ours, name in rest.items():
        move(ours, name)
    for ours, name in blocks.items():
        for part in parts.split():
            part, _, other = part.partition(":")
            move(f"{ours}.{part}", f"{name}.{other or part}")
    for ours, name in attention.items():
        move(f"{ours}.norm", f"{name}.group_norm")
        for part, word in zip(("q", "k", "v", "proj_out"), words):
            move(f"{ours}.{part}", f"{name}.{word}")
        # fused rows: q, k, v of head 0, q, k, v of head 1, ...
        for leaf in ("weight", "bias"):
            if f"{ours}.qkv.{leaf}" in state:
                pieces = state.pop(f"{ours}.qkv.{leaf}").split(head_dim)
                for i, word in enumerate(words[:3]):
                    out[f"{name}.{word}.{leaf}"] = torch.cat(pieces[i::3])
    assert not state
    return {
        name: value.flatten(1) if ".attentions." in name and value.dim() > 1 else value
        for name, value in out.items()
    }


def pixel(words=NEW):
    net = randomize(build_network(**PIXEL)).eval()
    return net, theirs(net, PIXEL_BLOCKS, BLOCK, PIXEL_ATTENTION, PIXEL_REST, words)


def latent():
    net = randomize(build_network(**LATENT)).eval()
    return net, theirs(net, LATENT_BLOCKS, LATENT_BLOCK, LATENT_ATTENTION, LATENT_REST, head_dim=16)


def first():
    net = randomize(build_network(**FIRST)).eval()
    return net, theirs(net, FIRST_BLOCKS, BLOCK, FIRST_ATTENTION, FIRST_REST)

"""Weights as the diffusers library saves them, under the names of the original checkpoints.

Known are the two kinds of UNet2DModel (pixel space: `ddim-unet`; latent diffusion without
condition: `ldm-unet`), and VQModel and AutoencoderKL (`autoencoder-vq`, `autoencoder-kl`). The map
follows from three differences: what the parts of a block are called; that their up levels are
numbered in order of execution, ours by resolution (or, in ldm-unet, all blocks in one list); and
that their attention has linear layers q, k, v where ours has 1x1 convolutions, fused in ldm-unet.
This was tested on folders made by the tests from the library's naming rules, never on a published
one."""

import re
from collections.abc import Callable
from typing import Any

import torch

State = dict[str, torch.Tensor]
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
# names before version 0.17
OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PLACE = re.compile(
    r"(encoder\.|decoder\.|)(down|mid|up)_blocks?\.(?:(\d+)\.)?"
    r"(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)"
)

# Settings that no shape shows. Where config.json is silent, the library's defaults hold: those of
# latent diffusion.
LATENT = {"flip_sin_to_cos": True, "freq_shift": 0, "norm_eps": 1e-5, "downsample_padding": 1}
LATENT |= {"norm_num_groups": 32, "attention_head_dim": 8, "center_input_sample": False}
LATENT |= {"mid_block_scale_factor": 1, "time_embedding_type": "positional", "act_fn": "silu"}
LATENT |= {"attention_legacy_order": False}
PIXEL = {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6, "downsample_padding": 0}
PIXEL = LATENT | PIXEL | {"attention_head_dim": None}
# may have any value in latent diffusion, and the model YAML has to say the same
ANY_VALUE = {"attention_head_dim"}


class Unfit(ValueError):
    """A sentence about a folder, to which the reader adds which folder."""


def to_published(state: State, config: Any) -> State:
    """Gives the weights of one diffusers model their original names and shapes; `config` is what
    its config.json holds. Raises Unfit for a model that no network here computes."""
    if not isinstance(config, dict) or "block_out_channels" not in config:
        what = "a network of diffusers (no block_out_channels)"
        raise Unfit(f"has a config.json that does not describe {what}")
    kind = config.get("_class_name")
    if kind in ("VQModel", "AutoencoderKL"):
        return rename_by_level(state, config)
    if kind != "UNet2DModel":
        raise Unfit(
            f"holds a {kind} of diffusers, expected UNet2DModel, VQModel or AutoencoderKL; "
            "give the model's original checkpoint instead"
        )
    given = LATENT | {name: value for name, value in config.items() if name in LATENT}
    is_latent = given["flip_sin_to_cos"]
    known = {n: v for n, v in LATENT.items() if n not in ANY_VALUE} if is_latent else PIXEL
    wrong = [f"{n}={given[n]} instead of {v}" for n, v in known.items() if given[n] != v]
    if wrong:
        raise Unfit(
            f"is a UNet2DModel that no network here computes: config.json has {', '.join(wrong)}"
        )
    return rename_by_position(state, config) if is_latent else rename_by_level(state, config)


# ---- names by level: ddim-unet and the autoencoders

LEVEL_PARTS = {"time_emb_proj": "temb_proj", "conv_shortcut": "nin_shortcut", "group_norm": "norm"}
LEVEL_PARTS |= {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
LEVEL_ENDS = {
    "time_embedding.linear_1": "temb.dense.0",
    "time_embedding.linear_2": "temb.dense.1",
    "conv_norm_out": "norm_out",
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
}


def rename_by_level(state: State, config: dict[str, Any]) -> State:
    """Renames the weights of ddim-unet and of the autoencoders."""
    last = len(config["block_out_channels"]) - 1

    def place(half, side, i, kind, j):
        if side == "mid":
            return f"{half}mid.attn_{j + 1}" if kind == "attentions" else f"{half}mid.block_{j + 1}"
        part = f"block.{j}" if kind == "resnets" else f"attn.{j}"
        if kind in ("downsamplers", "upsamplers"):
            part = kind.removesuffix("rs")
        return f"{half}{side}.{last - i if side == 'up' else i}.{part}"

    return rename(state, place, LEVEL_PARTS, LEVEL_ENDS, dims=4)


# ---- names by position: ldm-unet

LATENT_PARTS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "group_norm": "norm",
    "to_out.0": "proj_out",
}
LATENT_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def rename_by_position(state: State, config: dict[str, Any]) -> State:
    """Renames the weights of ldm-unet and fuses q, k and v; raises Unfit where one is missing."""
    num = config.get("layers_per_block", 2)
    attends = {name.split(".attentions")[0] for name in state}

    def place(_, side, i, kind, j):
        if side == "mid":
            return f"middle_block.{1 if kind == 'attentions' else 2 * j}"
        if side == "down":  # position 0 is the first convolution; a level ends with its resampling
            position = (i + 1) * (num + 1) if kind == "downsamplers" else i * (num + 1) + j + 1
            return f"input_blocks.{position}.{int(kind == 'attentions')}"
        if kind == "upsamplers":  # beside the last block of its level
            return f"output_blocks.{i * (num + 1) + num}.{2 if f'up_blocks.{i}' in attends else 1}"
        return f"output_blocks.{i * (num + 1) + j}.{int(kind == 'attentions')}"

    named = rename(state, place, LATENT_PARTS, LATENT_ENDS, dims=3)
    strided = re.compile(r"(input_blocks\.\d+\.0)\.conv\.")
    named = {strided.sub(r"\1.op.", name): value for name, value in named.items()}
    for name in [name for name in named if ".to_q." in name]:
        q, k, v = (name.replace(".to_q.", f".{part}.") for part in ("to_q", "to_k", "to_v"))
        if k not in named or v not in named:
            raise Unfit(f"has an attention without all of its weights ({name})")
        qkv = [named.pop(part) for part in (q, k, v)]
        num_rows = qkv[0].shape[0]
        width = config.get("attention_head_dim", LATENT["attention_head_dim"]) or num_rows
        # The published order, for each head its q, k and v rows: (3, heads, rows, ...) to
        # (heads, 3, rows, ...)
        rows = torch.stack(qkv).unflatten(1, (num_rows // width, -1)).transpose(0, 1)
        named[name.replace(".to_q.", ".qkv.")] = rows.flatten(0, 2)
    return named


# ---- what both share


def rename(
    state: State,
    place: Callable[[str, str, int, str, int], str],
    parts: dict[str, str],
    ends: dict[str, str],
    *,
    dims: int,
) -> State:
    """Renames the weights `state`. `place(half, side, level, kind, index)` says where a block sits;
    `parts` and `ends` rename what is in a block and outside of all; the weights of attention get
    `dims` dimensions. Unknown names stay, for the loader to report."""
    named = {}
    for name, value in state.items():
        found = PLACE.fullmatch(name)
        if found:
            half, side, level, kind, index, part, leaf = found.groups()
            part = OLDER.get(part, part) if kind == "attentions" else part
            if kind == "attentions" and leaf == "weight" and value.dim() == 2:
                value = value.reshape(*value.shape, *[1] * (dims - 2))
            block = place(half, side, int(level or 0), kind, int(index))
            name = f"{block}.{parts.get(part, part)}.{leaf}"
        else:
            base, _, leaf = name.rpartition(".")
            name = f"{ends.get(base, base)}.{leaf}"
        named[name] = value
    return named

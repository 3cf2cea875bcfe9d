"""Tiny networks of improved, guided and latent diffusion, one for every option."""

import torch
from conftest import randomize

from models.zoo import build_network

TINY = {
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1, 2],
    "attention_resolutions": [2],
    "num_heads": 2,
}


def tiny(family="ldm-unet", **options):
    return randomize(build_network(family, **TINY | options)).eval()


def inputs():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [7, 801]
    )


OPTIONS = {
    "transformer": {"use_spatial_transformer": True, "context_dim": 24, "transformer_depth": 2},
    "transformer without context": {"use_spatial_transformer": True},
    "transformer and classes": {
        "use_spatial_transformer": True,
        "context_dim": 24,
        "num_classes": 5,
    },
    "classes": {"num_classes": 5, "resblock_updown": True},
    "no convolution when resampling": {"conv_resample": False},
    "three levels, two blocks": {
        "channel_mult": [2, 1, 3],
        "num_res_blocks": 2,
        "attention_resolutions": [1, 4],
    },
    "fractional widths": {
        "model_channels": 64,
        "channel_mult": [0.5, 1, 1.5],
        "use_scale_shift_norm": True,
    },
    "odd width": {"model_channels": 33, "channel_mult": [32 / 33, 64 / 33]},
    "no attention but in the middle": {"attention_resolutions": []},
}


CONTEXT, LABELS = torch.zeros(2, 7, 24), torch.tensor([0, 4])


def condition(options):
    """What a network of these options takes."""
    context, labels = (
        torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(2)),
        torch.tensor([1, 4]),
    )
    if "context_dim" in options:
        return (context, labels) if "num_classes" in options else context
    return labels if "num_classes" in options else None

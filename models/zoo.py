"""Networks by family name: the word in a model YAML -> the class that builds it."""

import inspect
from functools import partial
from typing import Any

from torch import nn

from base.errors import check_options, unknown_word
from ddim.unet import UNet
from ldm.autoencoder import AutoencoderKL, AutoencoderVQ
from ldm.conditioning import ClassEmbedder, TextEncoder
from ldm.unet import UNet as LatentUNet

NETWORKS = {
    "ddim-unet": UNet,
    "ldm-unet": LatentUNet,
    "improved-unet": partial(LatentUNet, num_heads=1),
    "guided-unet": partial(LatentUNet, num_heads=1),
    "autoencoder-kl": AutoencoderKL,
    "autoencoder-vq": AutoencoderVQ,
    "class-embedder": ClassEmbedder,
    "clip-text": TextEncoder,
}


def build_network(family: str, **options: Any) -> nn.Module:
    """Builds the network of a model YAML, with fresh weights. Raises ValueError for an unknown
    family, an unknown option or a missing one."""
    if family not in NETWORKS:
        raise ValueError(unknown_word(f"network family '{family}' is unknown", family, NETWORKS))
    builder = NETWORKS[family]
    known = inspect.signature(builder).parameters
    needed = [name for name, option in known.items() if option.default is option.empty]
    check_options(f"network family '{family}'", options, known, needed, where=" in the model YAML")
    return builder(**options)

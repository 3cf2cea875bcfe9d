"""Networks by family name: the word in a model YAML -> the class that builds it."""

import inspect
from functools import partial

from base.errors import unknown_word
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


def build_network(family, **options):
    """The network of a model YAML, with fresh weights. Raises ValueError for an unknown family,
    option or a missing one."""
    if family not in NETWORKS:
        raise ValueError(unknown_word(f"network family '{family}' is unknown", family, NETWORKS))
    builder = NETWORKS[family]
    known = inspect.signature(builder).parameters
    for name in options:
        if name not in known:
            raise ValueError(
                unknown_word(f"network family '{family}' has no option '{name}'", name, known)
            )
    missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
    if missing:
        raise ValueError(f"network family '{family}' needs {', '.join(missing)} in the model YAML")
    return builder(**options)

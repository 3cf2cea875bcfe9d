"""Shared by the tests of integer networks: a fitted and hardened network of either family."""

import torch
from conftest import TINY, randomize
from tiny import SHAPE, make_job, normal

from models.zoo import build_network
from quant.network import QuantizedNet
from quant.passes.run import run_passes

LATENT = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1, 2],
    "num_heads": 2,
}
TEXT = LATENT | {"use_spatial_transformer": True, "context_dim": 6, "channel_mult": [1]}
UPDOWN = LATENT | {"resblock_updown": True, "use_scale_shift_norm": True}
NETWORKS = {"pixel": TINY, "latent": LATENT, "text": TEXT, "updown": UPDOWN}


def hardened(name, folder, rules, *, boundaries=(), passes=({"fit_ranges": {}},)) -> QuantizedNet:
    """A tiny network, quantized by rules."""
    options = NETWORKS[name]
    net = randomize(build_network(**options)).eval().requires_grad_(False)
    context = options.get("context_dim") or 0
    job = make_job(net, folder, rules, boundaries=boundaries, context=context)
    run_passes(job, passes)
    return job.net


def arguments(name, n=3, t=100.0, seed=7):
    """Of a tiny network."""
    context = NETWORKS[name].get("context_dim")
    more = [normal(n, 4, context, seed=seed)] if context else []
    return normal(n, *SHAPE, seed=seed), torch.full((n,), t), *more

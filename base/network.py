"""How a network describes itself to the quantization library: roles of layers, products of
activations as modules, attentions by the names of their parts."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

ROLES = (
    "stem",
    "out",
    "temb",
    "emb_proj",
    "conv1",
    "conv2",
    "skip",
    "down",
    "up",
    "q",
    "k",
    "v",
    "qkv",
    "probs",
    "proj",
    "proj_in",
    "ff",
    "scale_shift",
)


class Matmul(nn.Module):
    """Batched matrix product of two activations, a module so that it can be replaced by a quantized
    one.

    `roles` names the left and the right operand: ("q", "k") or ("v", "probs") and so on. With
    several heads they are axis 1 of both operands."""

    def __init__(self, *roles, num_heads=1):
        super().__init__()
        self.roles, self.num_heads = roles, num_heads

    def forward(self, a, b):
        return a @ b


def tag(role, layer, **facts):
    """Note a layer's role (and e.g. its `input_splits`) for the quantization rules; returns the
    layer."""
    layer.role = role
    for name, value in facts.items():
        setattr(layer, name, value)
    return layer


def timestep_embedding(t, width, *, cos_first=False):
    """Sinusoids of the steps t (N,), fractions allowed -> (N, width).

    Sines, then cosines, at frequencies from 1 to 1/10000 inclusive; with `cos_first` (the U-Nets in
    ldm/) cosines, then sines, and 1/10000 is left out. An odd width ends in a zero."""
    half = width // 2
    index = torch.arange(half, dtype=torch.float32, device=t.device)
    if cos_first:
        freqs = torch.exp(-math.log(10000) * index / half)
    else:
        freqs = torch.exp(index * -(math.log(10000) / (half - 1)))
    angles = t.float()[:, None] * freqs[None]
    waves = (angles.cos(), angles.sin()) if cos_first else (angles.sin(), angles.cos())
    return F.pad(torch.cat(waves, dim=1), (0, width % 2))


class Operand(nn.Identity):
    """An activation (N, C), passed on as it is: a module so that it can be replaced by a quantized
    one. `input_splits` are the channels of its parts."""


@dataclass
class AttentionPart:
    """Names of the modules of one attention, and the rows (output channels) that are q, k and v, by
    head, then channel. `norm` feeds the `readers` and nothing else."""

    norm: str
    readers: list
    q: str
    k: str
    v: str
    proj: str
    qk: str  # the product of queries and keys
    av: str  # that of the attention map and values
    q_rows: torch.Tensor
    k_rows: torch.Tensor
    v_rows: torch.Tensor

    @property
    def layers(self):
        return {*self.readers, self.q, self.k, self.v, self.proj}

    @property
    def is_to_itself(self):
        """Whether keys come from the same positions as queries, and not from a context."""
        return self.k in self.readers


def batch_of(t, x):
    return torch.full((x.shape[0],), float(t), device=x.device)


def attention_parts(net):
    """Every attention of a (quantized) network, in registration order: what its blocks say by
    `attention_parts(name)`."""
    return [
        part
        for name, module in net.named_modules()
        if hasattr(module, "attention_parts")
        for part in module.attention_parts(name)
    ]

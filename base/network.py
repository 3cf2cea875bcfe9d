"""How a network describes itself to the quantization library: roles of layers, products of
activations as modules, attentions by the names of their parts; and to engines that compute it
otherwise: norms with what follows them, and what only moves values, as modules."""

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from base.errors import unknown_word

Layer = TypeVar("Layer", bound=nn.Module)
ROLES = tuple(
    "stem out temb emb_proj conv1 conv2 skip down up q k v qkv probs proj proj_in ff "
    "scale_shift".split()
)


class Matmul(nn.Module):
    """A batched matrix product of two activations, as a module that a quantized one can replace.
    `roles` are those of the left and of the right operand: ("q", "k") or ("v", "probs") and so on.
    With several heads they are axis 1 of both operands."""

    def __init__(self, *roles: str, num_heads: int = 1) -> None:
        super().__init__()
        self.roles, self.num_heads = tuple(map(_known_role, roles)), num_heads

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Multiplies a (N, ..., L, D) by b (N, ..., D, M)."""
        return a @ b


class NormAct(nn.GroupNorm):
    """Group norm of a map and, with `silu`, the SiLU behind it, in one module that an engine can
    compute in one pass. In the precision of its own parameters: float32 beside convolutions in
    half. `num_groups` is 32 in all public models."""

    def __init__(
        self, channels: int, *, num_groups: int = 32, eps: float, silu: bool = True
    ) -> None:
        super().__init__(num_groups, channels, eps=eps)
        self.silu = silu

    def forward(
        self,
        x: torch.Tensor,
        added: torch.Tensor | None = None,
        scale_shift: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Norms x (N, C, H, W), plus `added` (N, C) where it is given; then multiplies with 1 +
        scale and adds shift, both (N, C), where they are given; then SiLU."""
        h = x if added is None else x + added[:, :, None, None]
        h = super().forward(h.to(self.weight.dtype)).to(h.dtype)
        if scale_shift is not None:
            scale, shift = (part[:, :, None, None] for part in scale_shift)
            h = h * (1 + scale) + shift
        return F.silu(h) if self.silu else h


class Softmax(nn.Module):
    """Attention maps of scores, in float32; in the data type of the scores."""

    def forward(self, scores: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        """Softmax of scores (..., L, L keys) * factor over the keys."""
        scaled = scores if factor == 1 else scores * factor
        return scaled.float().softmax(dim=-1).to(scores.dtype)


class Rearrangement(nn.Module):
    """What only moves and repeats the values of a map, and pads with `fill`: to quantize before it
    and behind it is the same."""


class Doubling(Rearrangement):
    """Nearest neighbour by two."""

    def forward(self, x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """x (N, C, H, W) -> (N, C, 2H, 2W)."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class PadEnd(Rearrangement):
    """One row below and one column at the right."""

    def forward(self, x: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """x (N, C, H, W) -> (N, C, H + 1, W + 1)."""
        return F.pad(x, (0, 1, 0, 1), value=fill)


def tag(role: str, layer: Layer, **attributes: Any) -> Layer:
    """Sets the role of a layer, and further attributes such as its `input_splits`, for the
    quantization rules to find; returns the layer. Raises ValueError for a role not in ROLES."""
    layer.role = _known_role(role)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def _known_role(role):
    if role not in ROLES:
        raise ValueError(unknown_word(f"role '{role}' is unknown", role, ROLES))
    return role


def timestep_embedding(t: torch.Tensor, width: int, *, cos_first: bool = False) -> torch.Tensor:
    """Computes the sinusoids (N, width) of the steps t (N,), fractions allowed.

    They are sines, then cosines, at frequencies from 1 to 1/10000 inclusive; with `cos_first` (the
    U-Nets in ldm/) cosines, then sines, and 1/10000 is left out. An odd width ends in a zero."""
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
    """An activation (N, C), passed on, as a module that a quantized one can replace.
    `input_splits` are the channels of its parts."""


@dataclass
class AttentionPart:
    """One attention: the names of its modules, and the rows (output channels) of them that are q, k
    and v, by head, then channel. `norm` feeds the `readers` and nothing else."""

    norm: str
    readers: list[str]
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
    def layers(self) -> set[str]:
        """The names of all its layers."""
        return {*self.readers, self.q, self.k, self.v, self.proj}

    @property
    def is_to_itself(self) -> bool:
        """Whether keys come from the same positions as queries, and not from a context."""
        return self.k in self.readers


def batch_of(t: float, x: torch.Tensor) -> torch.Tensor:
    """Repeats the network time t for every sample of x (N, ...): (N,) float on its device."""
    return torch.full((x.shape[0],), float(t), device=x.device)


def attention_parts(net: nn.Module) -> list[AttentionPart]:
    """Lists every attention of a (quantized) network in the order of registration, as its blocks
    describe themselves by their method `attention_parts(name)`. A block may be asked after its
    layers have been quantized: their weights are still there, their other attributes are not."""
    found = []
    for name, module in net.named_modules():
        if hasattr(module, "attention_parts"):
            found += module.attention_parts(name)
    return found

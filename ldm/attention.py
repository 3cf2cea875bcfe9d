"""Attention over the pixels of a feature map, in the two kinds that the U-Nets of ldm/unet.py are
made with.

Fused: one 1-d convolution gives q, k and v (Dhariwal & Nichol 2021, arXiv:2105.05233). Spatial
transformer: pixels become tokens and attend to each other and to a context (Rombach et al. 2022,
arXiv:2112.10752). Both take the softmax in float32. Parameter names are those of the public
checkpoints.

Axes: N images, C channels, H x W pixels; L tokens (pixels) of C features, M context tokens of E
features; a head is D wide and always axis 1 of what a `Matmul` multiplies."""

import torch
import torch.nn.functional as F
from torch import nn

from base.network import AttentionPart, Matmul, NormAct, Softmax, tag
from ddim.unet import conv


class QKVAttention(nn.Module):
    """Self-attention of a fused qkv tensor. Its 3C rows are `legacy`: for each head its q, k and v;
    or in the new order: q of all heads, k of all heads, v of all heads."""

    def __init__(self, num_heads: int, new_order: bool) -> None:
        super().__init__()
        self.num_heads, self.new_order = num_heads, new_order
        self.qk_matmul = Matmul("q", "k", num_heads=num_heads)
        self.softmax = Softmax()
        self.av_matmul = Matmul("v", "probs", num_heads=num_heads)

    def forward(self, qkv: torch.Tensor) -> torch.Tensor:
        """(N, 3C, L) -> (N, C, L)."""
        n, rows, length = qkv.shape
        if self.new_order:
            q, k, v = qkv.reshape(n, 3, self.num_heads, -1, length).unbind(1)
        else:
            q, k, v = qkv.reshape(n, self.num_heads, 3, -1, length).unbind(2)  # (N, heads, D, L)
        scale = q.shape[2] ** -0.25  # on both factors: the product of halves stays small
        scores = self.qk_matmul((q * scale).transpose(2, 3), k * scale)  # (N, heads, L, L keys)
        h = self.av_matmul(v, self.softmax(scores).transpose(2, 3))  # (N, heads, D, L)
        return h.reshape(n, rows // 3, length)


class AttentionBlock(nn.Module):
    """norm, fused multi-head self-attention over pixels, projection; plus the input."""

    is_unit = True

    def __init__(self, ch: int, num_heads: int, new_order: bool = False) -> None:
        super().__init__()
        self.norm = NormAct(ch, eps=1e-5, silu=False)
        self.qkv = tag("qkv", nn.Conv1d(ch, 3 * ch, 1))
        self.attention = QKVAttention(num_heads, new_order)
        self.proj_out = tag("proj", nn.Conv1d(ch, ch, 1))

    def attention_parts(self, name: str) -> list[AttentionPart]:
        """The AttentionPart of this block, whose name in the network is `name`."""
        heads, rows = self.attention.num_heads, torch.arange(3 * self.norm.num_channels)
        if self.attention.new_order:
            q_rows, k_rows, v_rows = rows.reshape(3, -1)
        else:
            q_rows, k_rows, v_rows = rows.reshape(heads, 3, -1).unbind(1)
        parts = ("norm", "qkv", "proj_out", "attention.qk_matmul", "attention.av_matmul")
        norm, qkv, *others = (f"{name}.{part}" for part in parts)
        rows = q_rows.flatten(), k_rows.flatten(), v_rows.flatten()
        return [AttentionPart(norm, [qkv], qkv, qkv, qkv, *others, *rows)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2)  # (N, C, L)
        h = self.proj_out(self.attention(self.qkv(tokens)))
        return x + h.reshape(x.shape)


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to a context, or to themselves where there is none."""

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, head_dim: int) -> None:
        super().__init__()
        inner, self.num_heads = num_heads * head_dim, num_heads
        self.to_q = tag("q", nn.Linear(dim, inner, bias=False))
        self.to_k = tag("k", nn.Linear(context_dim or dim, inner, bias=False))
        self.to_v = tag("v", nn.Linear(context_dim or dim, inner, bias=False))
        self.qk_matmul = Matmul("q", "k", num_heads=num_heads)
        self.softmax = Softmax()
        self.av_matmul = Matmul("probs", "v", num_heads=num_heads)
        self.to_out = nn.Sequential(tag("proj", nn.Linear(inner, dim)))

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, L, heads * D) -> (N, heads, L, D)."""
        return tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, L, C), context (N, M, E) -> (N, L, C)."""
        context = x if context is None else context
        projected = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (self.split_heads(tokens) for tokens in projected)
        scores = self.qk_matmul(q, k.transpose(2, 3))  # (N, heads, L, M)
        probs = self.softmax(scores, q.shape[3] ** -0.5)
        h = self.av_matmul(probs, v)  # (N, heads, L, D)
        return self.to_out(h.transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear to two halves: value times GELU of the gate (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = tag("ff", nn.Linear(dim, 2 * inner))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU to four times the features, then a linear layer back."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # The identity keeps the place of a dropout that no public network uses.
        inner = 4 * dim
        self.net = nn.Sequential(GEGLU(dim, inner), nn.Identity(), tag("ff", nn.Linear(inner, dim)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward: each behind a norm, each residual."""

    is_unit = True

    def __init__(self, dim: int, context_dim: int | None, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(dim, None, num_heads, head_dim)
        self.ff = FeedForward(dim)
        self.attn2 = CrossAttention(dim, context_dim, num_heads, head_dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def attention_parts(self, name: str) -> list[AttentionPart]:
        """The AttentionParts of both attentions of this block, called `name` in the network."""
        parts = []
        for attention, norm, fed in (("attn1", "norm1", "qkv"), ("attn2", "norm2", "q")):
            at = f"{name}.{attention}"
            layers = ("to_q", "to_k", "to_v", "to_out.0", "qk_matmul", "av_matmul")
            rows = [torch.arange(self.get_submodule(attention).to_q.weight.shape[0])] * 3
            readers = [f"{at}.to_{x}" for x in fed]
            names = [f"{at}.{layer}" for layer in layers]
            parts.append(AttentionPart(f"{name}.{norm}", readers, *names, *rows))
        return parts

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, L, C), context (N, M, E) -> (N, L, C)."""
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """norm, projection to heads * D features, blocks over the pixels, projection back; residual."""

    def __init__(
        self, ch: int, num_heads: int, head_dim: int, depth: int = 1, context_dim: int | None = None
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.norm = NormAct(ch, eps=1e-6, silu=False)
        self.proj_in = conv("proj_in", ch, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(inner, context_dim, num_heads, head_dim) for _ in range(depth)
        )
        self.proj_out = conv("proj", inner, ch, 1)

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, C, H, W), context (N, M, E) -> (N, C, H, W)."""
        h = self.proj_in(self.norm(x))
        tokens = h.flatten(2).transpose(1, 2)  # (N, L, C)
        given = () if context is None else (context,)
        for block in self.transformer_blocks:
            tokens = block(tokens, *given)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(h.shape))

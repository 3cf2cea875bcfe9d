"""The pixel-space U-Net of DDPM and DDIM (Ho et al. 2020, arXiv:2006.11239; Song et al. 2021,
arXiv:2010.02502).

Parameter names are those of the public checkpoints (`model-790000.ckpt` and its siblings), so these
load strictly. The network knows no bits, but it is written to be quantized: every product of two
activations is a module, every layer carries its `role`, and a convolution that reads a
concatenation knows where the halves meet (`input_splits`).

Axes: N images, C channels, H x W pixels, E embedding features, L = H*W positions."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base.network import (
    AttentionPart,
    Doubling,
    Matmul,
    NormAct,
    PadEnd,
    Softmax,
    tag,
    timestep_embedding,
)


def conv(role: str, in_ch: int, out_ch: int, size: int = 3, **attributes: Any) -> nn.Conv2d:
    """Makes a convolution that keeps the size of maps, tagged as in base.network.tag."""
    return tag(role, nn.Conv2d(in_ch, out_ch, size, padding=size // 2), **attributes)


class ResnetBlock(nn.Module):
    """norm, swish, conv; add the time embedding; norm, swish, dropout, conv; add the (projected)
    input.

    Blocks of an autoencoder have no time embedding: `temb_ch` None, `temb` left out."""

    is_unit = True

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        temb_ch: int | None,
        dropout: float,
        groups: int,
        input_splits: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = NormAct(in_ch, num_groups=groups, eps=1e-6)
        self.conv1 = conv("conv1", in_ch, out_ch)
        if temb_ch is not None:
            self.temb_proj = tag("emb_proj", nn.Linear(temb_ch, out_ch))
        self.norm2 = NormAct(out_ch, num_groups=groups, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv("conv2", out_ch, out_ch)
        if in_ch != out_ch:
            self.nin_shortcut = conv("skip", in_ch, out_ch, 1, input_splits=input_splits)

    def forward(self, x: torch.Tensor, temb: torch.Tensor | None = None) -> torch.Tensor:
        """x (N, C, H, W), temb (N, E) -> (N, C', H, W)."""
        h = self.conv1(self.norm1(x))
        added = None if temb is None else self.temb_proj(F.silu(temb))
        h = self.conv2(self.dropout(self.norm2(h, added)))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over pixels."""

    is_unit = True

    def __init__(self, ch: int, groups: int) -> None:
        super().__init__()
        self.norm = NormAct(ch, num_groups=groups, eps=1e-6, silu=False)
        self.q = conv("q", ch, ch, 1)
        self.k = conv("k", ch, ch, 1)
        self.v = conv("v", ch, ch, 1)
        self.qk_matmul = Matmul("q", "k")
        self.softmax = Softmax()
        self.av_matmul = Matmul("v", "probs")
        self.proj_out = conv("proj", ch, ch, 1)

    def attention_parts(self, name: str) -> list[AttentionPart]:
        """The AttentionPart of this block, whose name in the network is `name`."""
        parts = ("norm", "q", "k", "v", "proj_out", "qk_matmul", "av_matmul")
        norm, q, k, v, *others = (f"{name}.{part}" for part in parts)
        rows = [torch.arange(self.norm.num_channels)] * 3
        return [AttentionPart(norm, [q, k, v], q, k, v, *others, *rows)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, height, width = x.shape
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))  # (N, C, L)
        scores = self.qk_matmul(q.transpose(1, 2), k)  # (N, L queries, L keys)
        probs = self.softmax(scores, c**-0.5)
        h = self.av_matmul(v, probs.transpose(1, 2))  # (N, C, L)
        return x + self.proj_out(h.reshape(n, c, height, width))


def empty_level() -> nn.Module:
    """Makes a level of a U-Net, for blocks and attentions to come."""
    level = nn.Module()
    level.block, level.attn = nn.ModuleList(), nn.ModuleList()
    return level


class Downsample(nn.Module):
    """3x3 convolution of stride 2 over an input padded right and below only; or 2x2 mean."""

    def __init__(self, ch: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.pad = PadEnd()
            self.conv = tag("down", nn.Conv2d(ch, ch, 3, stride=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.pad(x)) if hasattr(self, "conv") else F.avg_pool2d(x, 2)


class Upsample(nn.Module):
    """Nearest neighbour by two, then a 3x3 convolution."""

    def __init__(self, ch: int, with_conv: bool) -> None:
        super().__init__()
        self.doubling = Doubling()
        if with_conv:
            self.conv = conv("up", ch, ch)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.doubling(x)
        return self.conv(x) if hasattr(self, "conv") else x


class UNet(nn.Module):
    """eps(x, t) of the pixel-space models.

    Arguments are the `model` and `data` keys of the DDIM YAML files: `ch` base width, `ch_mult`
    width of each level, `attn_resolutions` the sizes in pixels that have attention (counted from
    `image_size`), `norm_groups` the groups of every group norm (32 in all public models)."""

    def __init__(
        self,
        *,
        image_size: int,
        in_channels: int = 3,
        out_ch: int = 3,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 2, 2, 2),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.ch, self.in_channels, self.image_size = ch, in_channels, image_size
        self.num_res_blocks, self.num_levels = num_res_blocks, len(ch_mult)
        temb_ch = 4 * ch

        def block(in_ch, out, splits=None):
            return ResnetBlock(in_ch, out, temb_ch, dropout, norm_groups, splits)

        self.temb = nn.Module()
        dense = [tag("temb", nn.Linear(width, temb_ch)) for width in (ch, temb_ch)]
        self.temb.dense = nn.ModuleList(dense)
        self.conv_in = conv("stem", in_channels, ch)

        def add_block(level, in_ch, out, size, splits=None):
            level.block.append(block(in_ch, out, splits))
            if size in attn_resolutions:
                level.attn.append(AttnBlock(out, norm_groups))

        # channels of every tensor that is kept for the way up
        widths, size, h_ch = [ch], image_size, ch
        self.down = nn.ModuleList()
        for i, mult in enumerate(ch_mult):
            level = empty_level()
            for _ in range(num_res_blocks):
                add_block(level, h_ch, ch * mult, size)
                h_ch = ch * mult
                widths.append(h_ch)
            if i != self.num_levels - 1:
                level.downsample = Downsample(h_ch, resamp_with_conv)
                size //= 2
                widths.append(h_ch)
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = block(h_ch, h_ch)
        self.mid.attn_1 = AttnBlock(h_ch, norm_groups)
        self.mid.block_2 = block(h_ch, h_ch)

        ups = []  # numbered by level, run from the last to the first
        for i in reversed(range(self.num_levels)):
            level = empty_level()
            for _ in range(num_res_blocks + 1):
                skip_ch, out = widths.pop(), ch * ch_mult[i]
                add_block(level, h_ch + skip_ch, out, size, (h_ch, skip_ch))
                h_ch = out
            if i != 0:
                level.upsample = Upsample(h_ch, resamp_with_conv)
                size *= 2
            ups.insert(0, level)
        self.up = nn.ModuleList(ups)

        self.norm_out = NormAct(h_ch, num_groups=norm_groups, eps=1e-6)
        self.conv_out = conv("out", h_ch, out_ch)

    def embed_time(self, t: torch.Tensor) -> torch.Tensor:
        """t (N,) float or integer steps -> (N, E), what the blocks project."""
        dense_0, dense_1 = self.temb.dense
        waves = timestep_embedding(t, self.ch).to(self.norm_out.weight.dtype)
        return dense_1(F.silu(dense_0(waves)))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W) float, t (N,) float or integer steps -> eps, shaped as x."""
        temb = self.embed_time(t)

        skips = [self.conv_in(x)]
        for level in self.down:
            for j, block in enumerate(level.block):
                h = block(skips[-1], temb)
                skips.append(level.attn[j](h) if len(level.attn) else h)
            if hasattr(level, "downsample"):
                skips.append(level.downsample(skips[-1]))

        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(skips[-1], temb)), temb)

        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[j](h) if len(level.attn) else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(self.norm_out(h))

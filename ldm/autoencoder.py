"""The autoencoders around latent diffusion (Rombach et al. 2022, arXiv:2112.10752): an image to a
latent and back.

Parameter names are those of the public first stages (`first_stage_model.` without that prefix), so
these load strictly. The blocks are those of the pixel-space U-Net without a time embedding, so
quantization finds the same roles. The scale factor between these latents and those of the diffusion
belongs to the caller.

Axes: N images, C channels, H x W pixels; the latent has D channels and h x w positions; K code
vectors."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base.errors import check_options, unknown_word
from base.network import NormAct
from ddim.unet import AttnBlock, Downsample, ResnetBlock, Upsample, conv, empty_level

Pair = tuple[torch.Tensor, torch.Tensor]
COMMITMENT = 0.25  # weight of the commitment term (van den Oord et al. 2017, beta of Eq. 3)
DISTANCES = 2**24  # (position, code) pairs compared at a time: 128 MiB in double precision


@dataclass(frozen=True)
class Layout:
    """What the encoder and the decoder have in common: the `ddconfig` of the public YAML files."""

    double_z: bool  # the encoder gives two values a latent channel, mean and log-variance
    z_channels: int
    # image size in pixels that attn_resolutions counts from; any size can be encoded
    resolution: int
    ch: int  # base width
    ch_mult: tuple  # width of each level in units of ch
    num_res_blocks: int  # per level of the encoder; the decoder has one more
    in_channels: int = 3
    out_ch: int = 3
    attn_resolutions: tuple = ()
    dropout: float = 0.0
    resamp_with_conv: bool = True
    attn_type: str = "vanilla"  # "none": no attention anywhere, in the middle neither
    norm_groups: int = 32  # 32 in all public models

    def __post_init__(self):
        if self.attn_type not in ("vanilla", "none"):
            complaint = f"attn_type '{self.attn_type}' of the ddconfig is unknown"
            raise ValueError(unknown_word(complaint, self.attn_type, ["vanilla", "none"]))

    def block(self, in_ch: int, out_ch: int) -> ResnetBlock:
        """Makes a block without a time embedding."""
        return ResnetBlock(in_ch, out_ch, None, self.dropout, self.norm_groups)

    def attention(self, ch: int) -> nn.Module:
        """Makes an attention, or nothing where there is none anywhere."""
        return AttnBlock(ch, self.norm_groups) if self.attn_type == "vanilla" else nn.Identity()

    def level(self, in_ch: int, out_ch: int, num_blocks: int, i: int) -> nn.Module:
        """Makes level i from the largest size down: its blocks, and attentions where asked for."""
        level, in_channels = empty_level(), [in_ch] + [out_ch] * (num_blocks - 1)
        level.block.extend(self.block(ch, out_ch) for ch in in_channels)
        if self.resolution // 2**i in self.attn_resolutions:
            level.attn.extend(self.attention(out_ch) for _ in in_channels)
        return level

    def middle(self, ch: int) -> nn.Module:
        """Makes a block, an attention and a block."""
        mid = nn.Module()
        mid.block_1 = self.block(ch, ch)
        mid.attn_1 = self.attention(ch)
        mid.block_2 = self.block(ch, ch)
        return mid


def read_layout(ddconfig: dict[str, Any], double_z: bool) -> Layout:
    """Reads the Layout from a `ddconfig`. Raises ValueError for mistakes, another double_z too."""
    known = inspect.signature(Layout).parameters
    needed = [name for name, option in known.items() if option.default is option.empty]
    check_options("the ddconfig of the autoencoder", ddconfig, known, needed, kind="key")
    if ddconfig["double_z"] is not double_z:
        raise ValueError(
            f"the ddconfig says double_z: {ddconfig['double_z']}; expected true for an "
            "autoencoder-kl and false for an autoencoder-vq"
        )
    return Layout(**ddconfig)


def run_level(level: nn.Module, h: torch.Tensor) -> torch.Tensor:
    """Runs the blocks and attentions of a level, in turn, on h (N, C, H, W)."""
    for j, block in enumerate(level.block):
        h = block(h)
        h = level.attn[j](h) if len(level.attn) else h
    return h


class Encoder(nn.Module):
    """Image (N, C, H, W) -> (N, z_channels, h, w), or twice the channels with double_z."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        h_ch, last = layout.ch, len(layout.ch_mult) - 1
        self.conv_in = conv("stem", layout.in_channels, h_ch)
        self.down = nn.ModuleList()
        for i, mult in enumerate(layout.ch_mult):
            self.down.append(layout.level(h_ch, layout.ch * mult, layout.num_res_blocks, i))
            h_ch = layout.ch * mult
            if i != last:
                self.down[i].downsample = Downsample(h_ch, layout.resamp_with_conv)
        self.mid = layout.middle(h_ch)
        self.norm_out = NormAct(h_ch, num_groups=layout.norm_groups, eps=1e-6)
        self.conv_out = conv("out", h_ch, layout.z_channels * (2 if layout.double_z else 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(image)
        for level in self.down:
            h = run_level(level, h)
            h = level.downsample(h) if hasattr(level, "downsample") else h
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(self.norm_out(h))


class Decoder(nn.Module):
    """(N, z_channels, h, w) -> image (N, out_ch, H, W), not clamped."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        h_ch = layout.ch * layout.ch_mult[-1]
        self.conv_in = conv("stem", layout.z_channels, h_ch)
        self.mid = layout.middle(h_ch)
        ups = []  # numbered by level, run from the last to the first
        for i, mult in reversed(list(enumerate(layout.ch_mult))):
            ups.insert(0, layout.level(h_ch, layout.ch * mult, layout.num_res_blocks + 1, i))
            h_ch = layout.ch * mult
            if i != 0:
                ups[0].upsample = Upsample(h_ch, layout.resamp_with_conv)
        self.up = nn.ModuleList(ups)
        self.norm_out = NormAct(h_ch, num_groups=layout.norm_groups, eps=1e-6)
        self.conv_out = conv("out", h_ch, layout.out_ch)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for level in reversed(self.up):
            h = run_level(level, h)
            h = level.upsample(h) if hasattr(level, "upsample") else h
        return self.conv_out(self.norm_out(h))


class AutoencoderKL(nn.Module):
    """A normal law over latents, kept near the standard one. An image H x W has latents (embed_dim,
    H/f, W/f), f being the attribute `downsampling`."""

    def __init__(self, *, embed_dim: int, ddconfig: dict[str, Any]) -> None:
        super().__init__()
        layout = read_layout(ddconfig, double_z=True)
        self.embed_dim, self.downsampling = embed_dim, 2 ** (len(layout.ch_mult) - 1)
        self.encoder, self.decoder = Encoder(layout), Decoder(layout)
        self.quant_conv = conv("out", 2 * layout.z_channels, 2 * embed_dim, 1)
        self.post_quant_conv = conv("stem", embed_dim, layout.z_channels, 1)

    def moments(self, image: torch.Tensor) -> Pair:
        """(N, C, H, W) -> mean and log-variance of its latents, each (N, D, h, w)."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, H, W) in [-1, 1] -> latent (N, D, h, w): drawn with `noise`, or the mode."""
        mean, logvar = self.moments(image)
        return mean if noise is None else mean + (logvar / 2).exp() * noise

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """(N, D, h, w) -> (N, C, H, W), nominally in [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z))

    def forward(self, image: torch.Tensor, noise: torch.Tensor) -> Pair:
        """For training: reconstruction (N, C, H, W), and the mean over images of the
        Kullback-Leibler divergence of their latents from the standard normal law (Kingma and
        Welling 2014, arXiv:1312.6114, Appendix B)."""
        mean, logvar = self.moments(image)
        divergence = (mean**2 + logvar.exp() - 1 - logvar).sum(dim=(1, 2, 3)) / 2
        return self.decode(mean + (logvar / 2).exp() * noise), divergence.mean()


class AutoencoderVQ(nn.Module):
    """A codebook between encoder and decoder (van den Oord et al. 2017, arXiv:1711.00937). The
    diffusion's latents are those before the codebook; decoding goes through it."""

    def __init__(self, *, embed_dim: int, n_embed: int, ddconfig: dict[str, Any]) -> None:
        super().__init__()
        layout = read_layout(ddconfig, double_z=False)
        self.embed_dim, self.downsampling = embed_dim, 2 ** (len(layout.ch_mult) - 1)
        self.encoder, self.decoder = Encoder(layout), Decoder(layout)
        self.quantize = nn.Module()
        codes = torch.empty(n_embed, embed_dim).uniform_(-1 / n_embed, 1 / n_embed)
        self.quantize.embedding = nn.Embedding.from_pretrained(codes, freeze=False)
        self.quant_conv = conv("out", layout.z_channels, embed_dim, 1)
        self.post_quant_conv = conv("stem", embed_dim, layout.z_channels, 1)

    def encode(self, image: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """(N, C, H, W) in [-1, 1] -> latent (N, D, h, w) before the codebook. There is no law to
        draw from: `noise` is taken so that both kinds are called alike, and has no effect."""
        return self.quant_conv(self.encoder(image))

    def nearest(self, z: torch.Tensor) -> Pair:
        """(N, D, h, w) -> the code vectors nearest to it, of that shape, and their indices (N, h,
        w); of equally near ones the first."""
        codes = self.quantize.embedding.weight  # (K, D)
        with torch.no_grad():  # in double: the choice depends on neither batch nor TF32
            rows, wide = z.movedim(1, -1).flatten(0, -2).double(), codes.double()
            # |z - e|^2 = |e|^2 - 2 z.e + what all codes have in common
            norms = wide.square().sum(1)
            parts = rows.split(max(1, DISTANCES // len(codes)))
            nearest = [torch.addmm(norms, part, wide.T, alpha=-2).argmin(1) for part in parts]
        indices = torch.cat(nearest).view(z.shape[0], *z.shape[2:])
        return F.embedding(indices, codes).movedim(-1, 1), indices

    def decode(self, z: torch.Tensor, quantize: bool = True) -> torch.Tensor:
        """(N, D, h, w), snapped to the codebook if `quantize` -> (N, C, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(self.nearest(z)[0] if quantize else z))

    def forward(self, image: torch.Tensor) -> Pair:
        """For training: reconstruction (N, C, H, W), and the mean codebook and commitment terms."""
        z = self.encode(image)
        codes, _ = self.nearest(z)
        regulariser = F.mse_loss(codes, z.detach()) + COMMITMENT * F.mse_loss(z, codes.detach())
        passed = z + (codes - z).detach()  # straight through: the gradient at the codes goes to z
        return self.decode(passed, quantize=False), regulariser

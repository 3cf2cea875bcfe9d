"""The U-Net of Improved DDPM and of what grew out of it: guided diffusion, latent diffusion, Stable
Diffusion (Nichol & Dhariwal 2021, arXiv:2102.09672; Dhariwal & Nichol 2021, arXiv:2105.05233;
Rombach et al. 2022, arXiv:2112.10752).

Parameter names and options are those of the public checkpoints and configurations. Like
ddim/unet.py it knows no bits but is written to be quantized: attention products are modules, layers
carry their `role`, and a convolution that reads a concatenation knows where the halves meet
(`input_splits`). So does the embedding that scales and shifts, an Operand.

Axes: N images, C channels, H x W pixels, E embedding features; M context tokens of D features."""

from collections.abc import Sequence

import torch
from torch import nn

from base.network import NormAct, Operand, tag, timestep_embedding
from ddim.unet import Upsample, conv
from ldm.attention import AttentionBlock, BasicTransformerBlock, SpatialTransformer

# a context (N, M, D), class labels (N,), both, or nothing
Condition = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None
Context = torch.Tensor | None


class Downsample(nn.Module):
    """3x3 convolution of stride 2, padded all round; 2x2 mean without convolution."""

    def __init__(self, ch: int, with_conv: bool) -> None:
        super().__init__()
        if with_conv:
            self.op = tag("down", nn.Conv2d(ch, ch, 3, stride=2, padding=1))
        else:
            self.op = nn.AvgPool2d(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """norm, swish, resample, conv; norm, swish, dropout, conv; add the (resampled, projected)
    input. The embedding is added before the second norm, or scales and shifts what comes out of
    it. `resample` is a module without parameters."""

    is_unit = True

    def __init__(
        self,
        in_ch: int,
        out_ch: int,
        emb_ch: int,
        *,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: nn.Module | None = None,
        input_splits: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        # identities keep the places of activations, which the norms before them include
        self.in_layers = nn.Sequential(
            NormAct(in_ch, eps=1e-5), nn.Identity(), conv("conv1", in_ch, out_ch)
        )
        self.resample = resample or nn.Identity()
        emb_out = 2 * out_ch if scale_shift else out_ch
        self.emb_layers = nn.Sequential(nn.SiLU(), tag("emb_proj", nn.Linear(emb_ch, emb_out)))
        if scale_shift:
            self.emb_layers.append(tag("scale_shift", Operand(), input_splits=(out_ch, out_ch)))
        self.out_layers = nn.Sequential(
            NormAct(out_ch, eps=1e-5),
            nn.Identity(),
            nn.Dropout(dropout),
            conv("conv2", out_ch, out_ch),
        )
        self.skip_connection = nn.Identity()
        if in_ch != out_ch:
            self.skip_connection = conv("skip", in_ch, out_ch, 1, input_splits=input_splits)

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """x (N, C, H, W), emb (N, E) -> (N, C', H', W')."""
        norm1, _, conv1 = self.in_layers
        norm2, _, dropout, conv2 = self.out_layers
        h = conv1(self.resample(norm1(x)))
        emb = self.emb_layers(emb).to(h.dtype)
        h = norm2(h, scale_shift=emb.chunk(2, dim=1)) if self.scale_shift else norm2(h, emb)
        return self.skip_connection(self.resample(x)) + conv2(dropout(h))


class Chain(nn.Sequential):
    """Layers in a row, each given what it takes."""

    def forward(self, x: torch.Tensor, emb: torch.Tensor, context: Context) -> torch.Tensor:
        given = {ResBlock: (emb,), SpatialTransformer: (context,)}
        for layer in self:
            x = layer(x, *given.get(type(layer), ()))
        return x


class UNet(nn.Module):
    """eps(x, t, cond), or eps and the variance stacked where `out_channels` is twice `in_channels`.

    Attention sits at the downsampling factors `attention_resolutions` (some configurations call
    them `attention_downsampling_factors`) and in the middle. A head is `num_head_channels` wide if
    that is positive, else there are `num_heads` at every level (`num_heads_upsample` on the way
    up). `use_spatial_transformer` replaces fused attention by transformers of `transformer_depth`
    blocks that attend to a context of `context_dim` features. With `num_classes` the network adds
    an embedding of the class to that of the step. `use_fp16` keeps the convolutions and
    transformers between embedding and output in half precision. `image_size` is the nominal size of
    x, for those who draw noise; `use_checkpoint` (of the publishers' training) has no effect."""

    def __init__(
        self,
        *,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int] | None = None,
        attention_downsampling_factors: Sequence[int] | None = None,
        image_size: int | None = None,
        dropout: float = 0.0,
        channel_mult: Sequence[float] = (1, 2, 4, 8),
        conv_resample: bool = True,
        num_classes: int | None = None,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        legacy: bool = True,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
    ) -> None:
        super().__init__()
        if (attention_resolutions is None) == (attention_downsampling_factors is None):
            raise ValueError(
                "the U-Net needs 'attention_resolutions' or, by its other name, "
                "'attention_downsampling_factors': one of them, [] for attention in the middle only"
            )
        if num_heads < 1 and num_head_channels < 1:
            raise ValueError("the U-Net needs 'num_heads' or 'num_head_channels'")
        if context_dim is not None and not use_spatial_transformer:
            raise ValueError("'context_dim' needs 'use_spatial_transformer: true'")
        if attention_resolutions is None:
            attention_resolutions = attention_downsampling_factors
        self.in_channels, self.out_channels, self.image_size = in_channels, out_channels, image_size
        self.model_channels, self.num_classes = model_channels, num_classes
        self.context_dim = context_dim
        emb_ch = 4 * model_channels
        level_channels = [int(mult * model_channels) for mult in channel_mult]

        options = {"dropout": dropout, "scale_shift": use_scale_shift_norm}

        def block(in_ch, out_ch, **more):
            return ResBlock(in_ch, out_ch, emb_ch, **options, **more)

        def resampler(kind, ch):
            if resblock_updown:
                return block(ch, ch, resample=kind(ch, False))
            return kind(ch, conv_resample)

        def attention(ch, num_heads):
            fixed_width = num_head_channels > 0
            heads = ch // num_head_channels if fixed_width else num_heads
            divisor = num_head_channels if fixed_width else heads
            if heads < 1 or not use_spatial_transformer and ch % divisor:
                wanted = f"heads of {num_head_channels}" if fixed_width else f"{heads} heads"
                raise ValueError(f"{ch} channels cannot be split evenly into {wanted}")
            if not use_spatial_transformer:
                return AttentionBlock(ch, heads, use_new_attention_order)
            # Where heads do not fill the level, `legacy` widens them; else the transformer narrows.
            head_dim = num_head_channels if fixed_width and not legacy else ch // heads
            return SpatialTransformer(ch, heads, head_dim, transformer_depth, context_dim)

        dense_0, dense_1 = (tag("temb", nn.Linear(n, emb_ch)) for n in (model_channels, emb_ch))
        self.time_embed = nn.Sequential(dense_0, nn.SiLU(), dense_1)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_ch)

        ch, factor = level_channels[0], 1
        self.input_blocks = nn.ModuleList([Chain(conv("stem", in_channels, ch))])
        widths = [ch]  # channels of every tensor that is kept for the way up
        for level, out_ch in enumerate(level_channels):
            for _ in range(num_res_blocks):
                layers = [block(ch, out_ch)]
                ch = out_ch
                if factor in attention_resolutions:
                    layers.append(attention(ch, num_heads))
                self.input_blocks.append(Chain(*layers))
                widths.append(ch)
            if level != len(level_channels) - 1:
                self.input_blocks.append(Chain(resampler(Downsample, ch)))
                factor *= 2
                widths.append(ch)

        self.middle_block = Chain(block(ch, ch), attention(ch, num_heads), block(ch, ch))

        # As released, only fused attention with legacy heads minds `num_heads_upsample`.
        apart = num_heads_upsample > 0 and legacy and not use_spatial_transformer
        num_heads_up = num_heads_upsample if apart else num_heads
        self.output_blocks = nn.ModuleList()
        for level, out_ch in reversed(list(enumerate(level_channels))):
            for i in range(num_res_blocks + 1):
                skip_ch = widths.pop()
                layers = [block(ch + skip_ch, out_ch, input_splits=(ch, skip_ch))]
                ch = out_ch
                if factor in attention_resolutions:
                    layers.append(attention(ch, num_heads_up))
                if level != 0 and i == num_res_blocks:
                    layers.append(resampler(Upsample, ch))
                    factor //= 2
                self.output_blocks.append(Chain(*layers))

        self.out = nn.Sequential(
            NormAct(ch, eps=1e-5), nn.Identity(), conv("out", ch, out_channels)
        )
        if use_fp16:
            for trunk in (self.input_blocks, self.middle_block, self.output_blocks):
                for layer in trunk.modules():
                    if isinstance(layer, (nn.Conv1d, nn.Conv2d, BasicTransformerBlock)):
                        layer.half()

    def embed_time(self, t: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Steps t (N,), class labels (N,) if the network takes them -> (N, E) for the blocks."""
        dtype = self.out[0].weight.dtype
        emb = self.time_embed(timestep_embedding(t, self.model_channels, cos_first=True).to(dtype))
        return emb if labels is None else emb + self.label_emb(labels)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: Condition = None) -> torch.Tensor:
        """x (N, C, H, W) float, t (N,) float or integer steps -> (N, out_channels, H, W). `cond` is
        a context (N, M, D), class labels (N,), both, or None, as the network was made for."""
        context, labels = self.context_and_labels(cond, len(x))
        emb = self.embed_time(t, labels)

        # the trunk runs in the dtype of its weights
        h = x.to(next(self.input_blocks.parameters()).dtype)
        context = None if context is None else context.to(h.dtype)
        skips = []
        for chain in self.input_blocks:
            h = chain(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for chain in self.output_blocks:
            h = chain(torch.cat([h, skips.pop()], dim=1), emb, context)
        return self.out(h.to(x.dtype))

    def context_and_labels(self, cond: Condition, n: int) -> tuple[Context, torch.Tensor | None]:
        """Takes the condition of n samples apart into context or None, and labels or None. Raises
        ValueError if it is not what the network was made for."""
        takes_context, takes_labels = self.context_dim is not None, self.num_classes is not None
        context = labels = cond
        if takes_context and takes_labels and isinstance(cond, (tuple, list)) and len(cond) == 2:
            context, labels = cond

        expected, fits = [], takes_context or takes_labels or cond is None
        if takes_context:
            expected.append(f"a context of shape ({n}, length, {self.context_dim})")
            fits &= torch.is_tensor(context) and context.is_floating_point() and context.dim() == 3
            fits = fits and context.shape[::2] == (n, self.context_dim)
        if takes_labels:
            expected.append(f"class labels of shape ({n},), torch.int64")
            fits &= torch.is_tensor(labels) and labels.dtype == torch.int64 and labels.shape == (n,)
        if not fits:
            given = type(cond).__name__
            if torch.is_tensor(cond):
                given = f"{cond.dtype} of shape {tuple(cond.shape)}"
            expected = " and ".join(expected) or "None"
            raise ValueError(f"the condition of this network is {expected}; given: {given}")
        return (context if takes_context else None), (labels if takes_labels else None)

"""Training of the autoencoders around latent diffusion, and the latents that they make.
Axes: N images, C channels, H x W pixels; a latent has D channels and h x w positions."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.utils import save_image

from ldm.autoencoder import AutoencoderKL
from models.zoo import build_network
from tinydm.training.config import TrainConfig
from tinydm.training.loop import Batch, Training, random_flip

DIVERGENCE_WEIGHT = 1e-6  # of AutoencoderKL, as in latent diffusion
CODES_FROM = 1024  # images whose latents show which codes are unused


@torch.no_grad()
def encode_images(
    first_stage: nn.Module,
    images: torch.Tensor,
    batch_size: int = 250,
    scale_factor: float | None = None,
) -> tuple[torch.Tensor, float]:
    """Encodes images (N, 3, H, W) uint8 to latents (N, 2, D, h, w) of each and of its mirror image.
    Returns them and the factor in them: unless one is given, that which makes their variance 1."""
    latents, device = [], next(first_stage.parameters()).device
    for part in images.split(batch_size):
        x = (part.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        both = [first_stage.encode(x), first_stage.encode(x.flip(3))]
        latents.append(torch.stack(both, dim=1).cpu())
    latents = torch.cat(latents)
    scale_factor = scale_factor or float(1 / latents.std())
    return latents * scale_factor, scale_factor


class FirstStageTraining(Training):
    """An autoencoder of either kind: mean absolute error of the reconstruction, plus the
    regulariser of its kind.

    Codes that no latent is nearest to would never learn: in the first half of the training they are
    put on latents drawn at random at the beginning of each epoch."""

    def __init__(
        self, model_config: dict[str, Any], config: TrainConfig, images: torch.Tensor
    ) -> None:
        net = build_network(**model_config["first_stage"])
        super().__init__(net.to(memory_format=torch.channels_last), config)
        self.images, self.is_kl = images, isinstance(self.net, AutoencoderKL)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        x = random_flip(batch[0].to(self.device).float() / 127.5 - 1)
        if self.is_kl:
            size = [length // self.net.downsampling for length in x.shape[2:]]
            noise = torch.randn((len(x), self.net.embed_dim, *size), device=x.device)
            reconstruction, divergence = self.forward_net(x, noise)
            regulariser = DIVERGENCE_WEIGHT * divergence
        else:
            reconstruction, regulariser = self.forward_net(x)
        error = (reconstruction.float() - x).abs().mean()
        loss = error + regulariser
        self.note(error=error, loss=loss)
        return loss

    @torch.no_grad()
    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.is_kl or self.trainer.global_step > self.num_steps / 2:
            return
        picked = self.images[torch.randperm(len(self.images))[:CODES_FROM]].to(self.device)
        z = torch.cat([self.net.encode(part.float() / 127.5 - 1) for part in picked.split(128)])
        codes = self.net.quantize.embedding.weight
        used = torch.bincount(self.net.nearest(z)[1].flatten(), minlength=len(codes)) > 0
        latents = z.movedim(1, -1).flatten(0, 2)
        drawn = torch.randint(len(latents), (int((~used).sum()),), device=self.device)
        codes[~used] = latents[drawn].to(codes.dtype)

    @torch.no_grad()
    def draw_samples(self, path: Path, num: int = 40) -> None:
        """Draws rows of originals, each above its reconstructions."""
        net, x = self.ema.module.eval(), self.images[:num].to(self.device).float() / 127.5 - 1
        reconstructed = net.decode(net.encode(x)).clamp(-1, 1)
        rows = [images.unflatten(0, (-1, 10)) for images in (x, reconstructed)]
        save_image(torch.stack(rows, dim=1).flatten(0, 2) / 2 + 0.5, path, nrow=10)

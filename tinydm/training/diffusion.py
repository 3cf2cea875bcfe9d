"""Training of a diffusion model, of pixels or of latents, with classes or without.
Axes: N images, C channels, H x W pixels; a latent has D channels and h x w positions."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from ddim.schedule import make_schedule
from models.checkpoint_files import PREFIXES
from models.condition import build_condition
from models.diffusion import DiffusionModel
from models.sampling import Sampling, sample
from models.weights import averaged_name
from models.zoo import build_network
from tinydm.training.config import TrainConfig
from tinydm.training.loop import Batch, Training, random_flip

# what of a model's sampling decides about a picture of its samples
DRAWN_BY = ("sampler", "steps", "skip", "eta")
DROPPED = 0.1  # share of labels that are replaced by the null class, for guidance


def multiscale(error: torch.Tensor) -> torch.Tensor:
    """sum_k k * mean(pool_k(error)^2): squared error of images and of their k x k means.

    The minimum is that of the simple loss (Ho et al. 2020, Eq. 14), but a short training learns the
    mean colour, which is 3 of 3072 coefficients and decides the whole image at the noisy end, as
    fast as the details (the idea of the multi-scale loss of arXiv:2301.11093)."""
    scales = [2**i for i in range(error.shape[-1].bit_length())]
    return sum(k * F.avg_pool2d(error, k).square().mean() for k in scales)


class Conditional(nn.Module):
    """A U-Net and, where it has one, the embedder of its classes: they are trained together."""

    def __init__(self, unet: nn.Module, cond_stage: Any = None) -> None:
        super().__init__()
        self.unet, self.cond_stage = unet, cond_stage

    def forward(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Answers x (N, C, H, W) at the network times t (N,), asked for classes `labels` (N,)."""
        cond = () if self.cond_stage is None else (self.cond_stage(labels),)
        return self.unet(x, t, *cond)


class DiffusionTraining(Training):
    """Epsilon prediction, t uniform, images flipped at random; classes, where the model takes them,
    dropped at times.

    Batches are images (N, 3, H, W) uint8, or with a `first_stage` latents as made by
    `encode_images`. `net` is a Conditional; without it a new one is built."""

    def __init__(
        self,
        model_config: dict[str, Any],
        config: TrainConfig,
        first_stage: nn.Module | None = None,
        scale_factor: float = 1.0,
        net: Conditional | None = None,
    ) -> None:
        if net is None:
            parts = [model_config.get(part) for part in ("network", "cond_stage")]
            net = Conditional(*(build_network(**part) if part else None for part in parts))
        super().__init__(net.to(memory_format=torch.channels_last), config)
        self.schedule = make_schedule(**model_config["schedule"])
        sampling = model_config["sampling"]
        self.sampling = {key: value for key, value in sampling.items() if key in DRAWN_BY}
        self.guidance = model_config.get("guidance") or {}
        self.register_buffer("abar", self.schedule.abar.float(), persistent=False)
        # no part of the checkpoints
        self.__dict__["first_stage"], self.scale_factor = first_stage, scale_factor

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        x, t, labels, noise = self.noised(batch)
        loss = multiscale(self.forward_net(x, t, labels).float() - noise)
        self.note(loss=loss)
        return loss

    def noised(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Turns images or latents and their labels into what the network is asked, x (N, C, H, W),
        network times t (N,) and labels (N,), and the noise (N, C, H, W) that it should answer."""
        x, labels = (part.to(self.device) for part in batch)
        rows = torch.arange(len(x), device=self.device)
        if self.first_stage is None:
            x = random_flip(x.float() / 127.5 - 1)
        else:  # (N, 2, D, h, w): of the image and its mirror image
            x = x[rows, torch.randint(0, 2, (len(x),), device=self.device)]
        if "null_class" in self.guidance:
            dropped = torch.rand(len(x), device=self.device) < DROPPED
            labels = labels.masked_fill(dropped, self.guidance["null_class"])
        # One step from each of N equal strata of [0, T): the same uniform law, less variance of the
        # loss.
        share = (rows + torch.rand(len(x), device=self.device)) / len(x)
        t = (share * len(self.abar)).long()
        level, noise = self.abar[t][:, None, None, None], torch.randn_like(x)
        x = level.sqrt() * x + (1 - level).sqrt() * noise
        return x, t * self.schedule.time_scale, labels, noise

    def model(self) -> DiffusionModel:
        """Returns the averaged weights as a model that draws its classes in turn."""
        net, null = self.ema.module.eval(), self.guidance.get("null_class")
        unet, stage = net.unet, net.cond_stage
        num_classes = stage.embedding.num_embeddings if stage is not None else 0
        classes = [c for c in range(num_classes) if c != null]
        return DiffusionModel(
            name="training",
            net=unet,
            schedule=self.schedule,
            weights_hash="",
            shape=(unet.in_channels, unet.image_size, unet.image_size),
            first_stage=self.first_stage,
            scale_factor=self.scale_factor,
            guidance=self.guidance.get("scale", 1.0),
            condition=build_condition(unet, stage, {"classes": classes}, self.guidance),
        )

    @torch.no_grad()
    def draw_samples(self, path: Path, num: int = 80) -> None:
        """Draws a grid of samples with the model's own sampler, always from the same noise."""
        sampling = Sampling(**{"skip": "uniform"} | self.sampling, batch_size=num)
        images = sample(self.model(), range(num), sampling)
        save_image(images.float() / 255, path, nrow=10)

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the averaged weights: a pixel model's under the names of the network; a latent
        one's under those of a latent-diffusion checkpoint, with first stage and scale factor."""
        net = self.ema.module
        if self.first_stage is None:
            return net.unet.state_dict()
        weights = {}
        for part, module in ("first_stage", self.first_stage), ("cond_stage", net.cond_stage):
            if module is not None:
                weights |= {PREFIXES[part] + name: v for name, v in module.state_dict().items()}
        weights |= {averaged_name(name): v for name, v in net.unet.state_dict().items()}
        return weights | {"scale_factor": torch.tensor(self.scale_factor)}

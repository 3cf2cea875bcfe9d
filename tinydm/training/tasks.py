"""What the models that ship with the project learn: data, loss and picture of each training task.

Axes: N images, C channels, H x W pixels; a latent has D channels and h x w positions.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.utils import save_image

from ddim.schedule import make_schedule
from ldm.autoencoder import AutoencoderKL
from models.condition import build_condition
from models.diffusion import DiffusionModel
from models.sampling import sample
from models.weights import PREFIXES, averaged_name
from models.zoo import build_network
from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.qat import SMALLEST, prepare, scales_of
from tinydm.training.loop import Training

# what of a model's sampling decides about a picture of its samples
DRAWN_BY = ("sampler", "steps", "skip", "eta")
# share of labels that are replaced by the null class, for guidance
DROPPED = 0.1
DIVERGENCE_WEIGHT = 1e-6  # of AutoencoderKL, as in latent diffusion
CODES_FROM = 1024  # images whose latents show which codes are unused


def random_flip(x):
    flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)


def multiscale(error):
    """Squared error of the images and of their k x k means, weighted by k: sum_k k *
    mean(pool_k(error)^2).

    The minimum is that of the simple loss (Ho et al. 2020, Eq. 14), but a short training learns the
    mean colour, which is 3 of 3072 coefficients and decides the whole image at the noisy end, as
    fast as the details (the idea of the multi-scale loss of Hoogeboom et al. 2023,
    arXiv:2301.11093)."""
    scales = [2**i for i in range(error.shape[-1].bit_length())]
    return sum(k * F.avg_pool2d(error, k).square().mean() for k in scales)


class Conditional(nn.Module):
    """A U-Net and, where it has one, the embedder of its classes: they are trained together."""

    def __init__(self, unet, cond_stage=None):
        super().__init__()
        self.unet, self.cond_stage = unet, cond_stage

    def forward(self, x, t, labels):
        return (
            self.unet(x, t) if self.cond_stage is None else self.unet(x, t, self.cond_stage(labels))
        )


class DiffusionTraining(Training):
    """Epsilon prediction, t uniform, images flipped at random; classes, where the model takes them,
    dropped at times.

    Batches are images (N, 3, H, W) uint8, or with a `first_stage` latents as made by
    `encode_images`. `net` is a Conditional; without it a new one is built."""

    def __init__(self, model_config, config, first_stage=None, scale_factor=1.0, net=None):
        if net is None:
            net = Conditional(
                *(
                    build_network(**model_config[part]) if model_config.get(part) else None
                    for part in ("network", "cond_stage")
                )
            )
        super().__init__(net.to(memory_format=torch.channels_last), config)
        self.schedule = make_schedule(**model_config["schedule"])
        self.sampling = {
            key: value for key, value in model_config["sampling"].items() if key in DRAWN_BY
        }
        self.guidance = model_config.get("guidance") or {}
        self.register_buffer("abar", self.schedule.abar.float(), persistent=False)
        # no part of the checkpoints
        self.__dict__["first_stage"], self.scale_factor = first_stage, scale_factor

    def training_step(self, batch, _):
        x, t, labels, noise = self.noised(batch)
        loss = multiscale(self.forward_net(x, t, labels).float() - noise)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def noised(self, batch):
        """Images or latents and their labels -> what the network is asked, x (N, C, H, W), network
        times t (N,) and labels (N,), and the noise (N, C, H, W) that it should answer."""
        x, labels = (part.to(self.device) for part in batch)
        if self.first_stage is None:
            x = random_flip(x.float() / 127.5 - 1)
        # (N, 2, D, h, w): of the image and its mirror image
        else:
            x = x[
                torch.arange(len(x), device=self.device),
                torch.randint(0, 2, (len(x),), device=self.device),
            ]
        if "null_class" in self.guidance:
            dropped = torch.rand(len(x), device=self.device) < DROPPED
            labels = labels.masked_fill(dropped, self.guidance["null_class"])
        # One step from each of N equal strata of [0, T): the same uniform law, less variance of the
        # loss.
        t = (
            (torch.arange(len(x), device=self.device) + torch.rand(len(x), device=self.device))
            / len(x)
            * len(self.abar)
        ).long()
        level, noise = self.abar[t][:, None, None, None], torch.randn_like(x)
        return (
            level.sqrt() * x + (1 - level).sqrt() * noise,
            t * self.schedule.time_scale,
            labels,
            noise,
        )

    def model(self):
        """The averaged weights as a DiffusionModel; classes in turn."""
        net, null = self.ema.module.eval(), self.guidance.get("null_class")
        num_classes = net.cond_stage.embedding.num_embeddings if net.cond_stage is not None else 0
        classes = [c for c in range(num_classes) if c != null]
        return DiffusionModel(
            name="training",
            net=net.unet,
            schedule=self.schedule,
            weights_hash="",
            shape=(net.unet.in_channels, net.unet.image_size, net.unet.image_size),
            first_stage=self.first_stage,
            scale_factor=self.scale_factor,
            guidance=self.guidance.get("scale", 1.0),
            condition=build_condition(
                net.unet, net.cond_stage, {"classes": classes}, self.guidance
            ),
        )

    @torch.no_grad()
    def draw_samples(self, path, num=80):
        """A grid of samples with the model's own sampler, always from the same noise."""
        model = self.model()
        images = sample(model, model.eps, range(num), **self.sampling)
        save_image(images.float() / 255, path, nrow=10)

    def weights(self):
        """A pixel model's names are those of the network; a latent one's those of a
        latent-diffusion checkpoint, with first stage and scale factor."""
        net = self.ema.module
        if self.first_stage is None:
            return net.unet.state_dict()
        parts = {"first_stage": self.first_stage, "cond_stage": net.cond_stage}
        weights = {
            PREFIXES[part] + name: value
            for part, module in parts.items()
            if module is not None
            for name, value in module.state_dict().items()
        }
        weights |= {averaged_name(name): value for name, value in net.unet.state_dict().items()}
        return weights | {"scale_factor": torch.tensor(self.scale_factor)}


class QuantizedTraining(DiffusionTraining):
    """Quantization-aware training (quant/qat.py) of a pretrained `model`, whose network it takes
    over: the same loss on the network converted by `rules`, `dynamic` or not. Ranges are those of
    one `batch` at random t.

    AdamW, scales at a tenth of the rate and without weight decay (TDQ's groups). First and
    condition stage stay as they are; the average begins at the quantized network."""

    def __init__(self, model_config, config, model, rules, dynamic, batch):
        def encode(labels):
            return model.condition.encode(labels.tolist())

        net = Conditional(
            convert(model.net, rules), encode if model.condition is not None else None
        )
        super().__init__(model_config, config, model.first_stage, model.scale_factor, net)
        x, t, labels, _ = self.noised(batch)
        cond, which = (
            (encode(labels), torch.arange(len(x))) if model.condition is not None else (None, None)
        )
        net.functions = prepare(net.unet, CalibrationSet(x, t, cond, which), dynamic)
        net.train()
        self.pretrained, self.scales = model, scales_of(net.unet)
        self.restart_average()

    def build_optimizer(self):
        own = {id(scale) for scale in self.scales}
        others = [p for p in self.net.parameters() if p.requires_grad and id(p) not in own]
        groups = [
            {"params": others},
            {"params": self.scales, "lr": self.config.lr / 10, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.config.lr,
            betas=(0.9, self.config.beta2),
            weight_decay=self.config.weight_decay,
        )

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for scale in self.scales:
            scale.clamp_(min=SMALLEST)
        super().on_train_batch_end()

    def model(self):
        """The model around the averaged network, its quantization simulated."""
        return self.pretrained.with_net(self.ema.module.unet.eval())


@torch.no_grad()
def encode_images(first_stage, images, batch_size=250, scale_factor=None):
    """Images (N, 3, H, W) uint8 -> latents (N, 2, D, h, w) of each and of its mirror image, and the
    factor that they are multiplied by: without a given one that which makes their variance 1."""
    latents, device = [], next(first_stage.parameters()).device
    for part in images.split(batch_size):
        x = (part.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        latents.append(
            torch.stack([first_stage.encode(x), first_stage.encode(x.flip(3))], dim=1).cpu()
        )
    latents = torch.cat(latents)
    scale_factor = scale_factor or float(1 / latents.std())
    return latents * scale_factor, scale_factor


class FirstStageTraining(Training):
    """An autoencoder of either kind: mean absolute error of the reconstruction, plus the
    regulariser of its kind.

    Codes that no latent is nearest to would never learn: in the first half of the training they are
    put on latents drawn at random at the beginning of each epoch."""

    def __init__(self, model_config, config, images):
        super().__init__(
            build_network(**model_config["first_stage"]).to(memory_format=torch.channels_last),
            config,
        )
        self.images, self.is_kl = images, isinstance(self.net, AutoencoderKL)

    def training_step(self, batch, _):
        x = random_flip(batch[0].to(self.device).float() / 127.5 - 1)
        if self.is_kl:
            shape = (
                len(x),
                self.net.embed_dim,
                *(size // self.net.downsampling for size in x.shape[2:]),
            )
            reconstruction, divergence = self.forward_net(x, torch.randn(shape, device=x.device))
            regulariser = DIVERGENCE_WEIGHT * divergence
        else:
            reconstruction, regulariser = self.forward_net(x)
        error = (reconstruction.float() - x).abs().mean()
        self.log("error", error, on_step=False, on_epoch=True)
        loss = error + regulariser
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    @torch.no_grad()
    def on_train_epoch_start(self):
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
    def draw_samples(self, path, num=40):
        """Rows of originals, each above its reconstructions."""
        net, x = self.ema.module.eval(), self.images[:num].to(self.device).float() / 127.5 - 1
        rows = [
            images.unflatten(0, (-1, 10)) for images in (x, net.decode(net.encode(x)).clamp(-1, 1))
        ]
        save_image(torch.stack(rows, dim=1).flatten(0, 2) / 2 + 0.5, path, nrow=10)


class ClassifierTraining(Training):
    """Cross-entropy with label smoothing; images flipped, shifted by up to 4 pixels and partly
    erased."""

    def __init__(self, net, config):
        super().__init__(net.to(memory_format=torch.channels_last), config)

    def build_optimizer(self):
        return torch.optim.SGD(
            self.net.parameters(),
            lr=self.config.lr,
            momentum=0.9,
            nesterov=True,
            weight_decay=self.config.weight_decay,
        )

    def training_step(self, batch, _):
        x, y = random_flip(batch[0].to(self.device).float() / 255), batch[1].to(self.device)
        line = torch.arange(x.shape[2], device=self.device)
        rows, cols = (torch.randint(0, 9, (len(x), 1), device=self.device) + line for _ in range(2))
        padded, images = (
            F.pad(x, (4, 4, 4, 4), mode="reflect"),
            torch.arange(len(x), device=self.device),
        )
        x = padded[images[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        x = self.erase(x).contiguous(memory_format=torch.channels_last)
        logits = self.forward_net.logits(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log(
            "accuracy",
            (logits.argmax(1) == y).float().mean(),
            on_step=False,
            on_epoch=True,
            prog_bar=True,
        )
        return loss

    @staticmethod
    def erase(x, size=8):
        """One grey square of size x size per image (DeVries & Taylor 2017, arXiv:1708.04552)."""
        spans = []
        for length in x.shape[2:]:
            start = torch.randint(0, length - size + 1, (len(x), 1), device=x.device)
            position = torch.arange(length, device=x.device)
            spans.append((position >= start) & (position < start + size))
        hole = spans[0][:, None, :, None] & spans[1][:, None, None, :]
        return x.masked_fill(hole, 0.45)

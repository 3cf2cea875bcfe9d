"""Lightning modules that made the models which ship with the project.

An "epoch" is a fixed number of optimizer steps whose images, noise and augmentation follow from (seed, epoch) alone,
and checkpoints are written between epochs: a run that is killed and started again ends in the same weights.
"""
import copy
import math
import time
from pathlib import Path

import matplotlib
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset
from torchvision.utils import save_image

from ddim.sampler import SAMPLERS, SeededNoise
from ddim.schedule import make_schedule, step_sequence
from models.zoo import build_network

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend has to be chosen first)


class ImageBatches(Dataset):
    """Item i is the i-th batch (images, labels) of one epoch: a random draw without replacement within the epoch as
    long as the images last, fixed by (seed, epoch)."""

    def __init__(self, images, labels, *, batch_size, num_batches, seed, epoch):
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        rounds = math.ceil(batch_size * num_batches / len(images))
        order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(rounds)])
        self.batches = order[:batch_size * num_batches].view(num_batches, batch_size)
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, i):
        rows = self.batches[i]
        return self.images[rows], self.labels[rows]


class Data(pl.LightningDataModule):
    """Feeds a fresh `ImageBatches` to every epoch."""

    def __init__(self, images, labels, config):
        super().__init__()
        self.source, self.config = (images, labels), config

    def train_dataloader(self):
        c, epoch = self.config, self.trainer.current_epoch
        left = self.trainer.lightning_module.num_steps - epoch * c.steps_per_epoch       # the last epoch may be shorter
        batches = ImageBatches(*self.source, batch_size=c.batch_size, num_batches=max(min(c.steps_per_epoch, left), 1),
                               seed=c.seed, epoch=epoch)
        return DataLoader(batches, batch_size=None, generator=torch.Generator())    # spares the global stream


class Training(pl.LightningModule):
    """What both trainings share: linear warm-up, cosine to zero, an exponential moving average of weights.

    The average starts short and grows to `ema_decay`: min(decay, (1 + n)/(10 + n)) after n updates.
    """

    def __init__(self, net, config):
        super().__init__()
        self.net, self.config = net, config
        self.num_steps = config.num_images // config.batch_size

        def average(mean, value, n):
            decay = min(config.ema_decay, (1 + float(n)) / (10 + float(n)))
            return value + (mean - value) * decay
        self.ema = AveragedModel(net, avg_fn=average, use_buffers=True)
        # Not a submodule: a checkpoint holds the weights once, and does not depend on `compile`.
        self.__dict__["forward_net"] = torch.compile(net) if config.compile else net

    def configure_optimizers(self):
        optimizer = self.build_optimizer()

        def factor(step):
            done = min(step / self.num_steps, 1.0)
            return min(1.0, (step + 1) / self.config.warmup_steps) * 0.5 * (1 + math.cos(math.pi * done))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self):
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def on_train_batch_end(self, *_):
        self.ema.update_parameters(self.net)


def multiscale(error):
    """Squared error of the images and of their k x k means, weighted by k: sum_k k * mean(pool_k(error)^2).

    The minimum is that of the simple loss (Ho et al. 2020, Eq. 14), but a short training learns the mean colour, which
    is 3 of 3072 coefficients and decides the whole image at the noisy end, as fast as the details (the idea of the
    multi-scale loss of Hoogeboom et al. 2023, arXiv:2301.11093).
    """
    scales = [2 ** i for i in range(error.shape[-1].bit_length())]
    return sum(k * F.avg_pool2d(error, k).square().mean() for k in scales)


class DiffusionTraining(Training):
    """Epsilon prediction, t uniform, images flipped at random."""

    def __init__(self, model_config, config):
        net = build_network(**model_config["network"]).to(memory_format=torch.channels_last)
        super().__init__(net, config)
        self.schedule, self.sampling = make_schedule(**model_config["schedule"]), model_config["sampling"]
        self.register_buffer("abar", self.schedule.abar, persistent=False)

    def build_optimizer(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.config.lr, betas=(0.9, self.config.beta2))

    def training_step(self, batch, _):
        x = batch[0].to(self.device).float() / 127.5 - 1
        flip = torch.rand(len(x), 1, 1, 1, device=self.device) < 0.5
        x = torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)
        # One step from each of N equal strata of [0, T): the same uniform law, less variance of the loss.
        t = ((torch.arange(len(x), device=self.device) + torch.rand(len(x), device=self.device))
             / len(x) * len(self.abar)).long()
        level, noise = self.abar[t][:, None, None, None], torch.randn_like(x)
        loss = multiscale(self.forward_net(level.sqrt() * x + (1 - level).sqrt() * noise, t).float() - noise)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    @torch.no_grad()
    def draw_samples(self, path, num=64):
        """A grid of samples of the averaged weights with the model's own sampler, always from the same noise."""
        net, how = self.ema.module.eval(), self.sampling
        noise = SeededNoise(0, range(num), (net.in_channels, net.image_size, net.image_size), self.device)
        steps = step_sequence(how["skip"], how["steps"], self.schedule)
        x = SAMPLERS[how["sampler"]](net, noise.draw(), steps, self.schedule, noise=noise.draw, eta=how["eta"])
        save_image(x.clamp(-1, 1) / 2 + 0.5, path, nrow=8)


class ClassifierTraining(Training):
    """Cross-entropy with label smoothing; images flipped, shifted by up to 4 pixels and partly erased."""

    def __init__(self, net, config):
        super().__init__(net.to(memory_format=torch.channels_last), config)

    def build_optimizer(self):
        return torch.optim.SGD(self.net.parameters(), lr=self.config.lr, momentum=0.9, nesterov=True,
                               weight_decay=self.config.weight_decay)

    def training_step(self, batch, _):
        x, y = batch[0].to(self.device).float() / 255, batch[1].to(self.device)
        x = torch.where(torch.rand(len(x), 1, 1, 1, device=self.device) < 0.5, x.flip(3), x)
        line = torch.arange(x.shape[2], device=self.device)
        rows, cols = (torch.randint(0, 9, (len(x), 1), device=self.device) + line for _ in range(2))
        padded, images = F.pad(x, (4, 4, 4, 4), mode="reflect"), torch.arange(len(x), device=self.device)
        x = padded[images[:, None, None], :, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        x = self.erase(x).contiguous(memory_format=torch.channels_last)
        logits = self.forward_net.logits(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("accuracy", (logits.argmax(1) == y).float().mean(), on_step=False, on_epoch=True, prog_bar=True)
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


class Progress(pl.Callback):
    """One line an epoch with an estimate of what remains; every `sample_every` epochs the loss curve and samples."""

    def __init__(self, folder, sample_every):
        self.folder, self.sample_every, self.rows, self.started = Path(folder), sample_every, [], None

    def state_dict(self):
        return {"rows": copy.copy(self.rows)}

    def load_state_dict(self, state):
        self.rows = state["rows"]

    def on_train_epoch_start(self, trainer, module):
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer, module):
        if self.started is None:           # Lightning ends the saved epoch once more when it resumes
            return
        seconds, self.started = time.monotonic() - self.started, None
        loss = float(trainer.callback_metrics["loss"])
        images = trainer.global_step * module.config.batch_size
        self.rows.append((images, loss))
        left = (module.num_steps - trainer.global_step) / module.config.steps_per_epoch * seconds
        rate = module.config.steps_per_epoch * module.config.batch_size / seconds
        print(f"images {images:>9,}  loss {loss:.4f}  {rate:.0f} images/s  {left / 60:.0f} min left", flush=True)
        if trainer.current_epoch % self.sample_every == self.sample_every - 1 or left <= 0:
            self.plot()
            if hasattr(module, "draw_samples"):
                module.draw_samples(self.folder / f"samples_{images:09d}.png")

    def plot(self):
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot(*zip(*self.rows))
        axes.set(xlabel="images seen", ylabel="training loss", ylim=(0, min(1.0, 1.2 * self.rows[0][1])))
        axes.grid(alpha=0.3)
        figure.savefig(self.folder / "loss.png", dpi=100)
        pyplot.close(figure)


def fit(module, images, labels, folder):
    """Train to the end of the recipe in `folder`, from its last checkpoint if there is one; returns the loss rows."""
    folder, config = Path(folder), module.config
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, config.sample_every)
    keep = pl.callbacks.ModelCheckpoint(folder, filename="last", enable_version_counter=False,
                                        save_on_train_epoch_end=True)
    # The end is told in epochs: Lightning resumes a run that is told in steps with the data of the epoch before.
    num_epochs = math.ceil(module.num_steps / config.steps_per_epoch)
    trainer = pl.Trainer(max_epochs=num_epochs, accelerator=config.device, devices=1, precision=config.precision,
                         gradient_clip_val=config.grad_clip, callbacks=[progress, keep], logger=False,
                         reload_dataloaders_every_n_epochs=1, enable_progress_bar=False, enable_model_summary=False,
                         use_distributed_sampler=False)
    last = folder / "last.ckpt"
    try:
        trainer.fit(module, datamodule=Data(images, labels, config), ckpt_path=str(last) if last.exists() else None,
                    weights_only=True)
    except SystemExit:                       # Lightning ends the process on Ctrl-C; that is the script's to say
        raise KeyboardInterrupt from None
    return progress.rows

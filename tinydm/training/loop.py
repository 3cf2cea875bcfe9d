"""The training machinery; what is learned stands beside it, one task a file.

An "epoch" is a fixed number of optimizer steps whose images, noise and augmentation follow from
(seed, epoch) alone, and checkpoints are written between epochs: a run that is killed and started
again ends in the same weights."""

import copy
import logging
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

from tinydm.training.config import TrainConfig

Batch = tuple[torch.Tensor, torch.Tensor]  # images (N, ...) and their labels (N,)


class ImageBatches(Dataset):
    """The batches (images, labels) of an epoch, drawn by (seed, epoch), each image again only when
    all were drawn."""

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
        epoch: int,
    ) -> None:
        rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        rounds = math.ceil(batch_size * num_batches / len(images))
        order = torch.cat([torch.randperm(len(images), generator=rng) for _ in range(rounds)])
        self.batches = order[: batch_size * num_batches].view(num_batches, batch_size)
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> Batch:
        rows = self.batches[i]
        return self.images[rows], self.labels[rows]


class Data(pl.LightningDataModule):
    """Feeds fresh `ImageBatches` to every epoch."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor, config: TrainConfig) -> None:
        super().__init__()
        self.source, self.config = (images, labels), config

    def train_dataloader(self) -> DataLoader:
        c, epoch = self.config, self.trainer.current_epoch
        # the last epoch may be shorter
        left = self.trainer.lightning_module.num_steps - epoch * c.steps_per_epoch
        size = {"batch_size": c.batch_size, "num_batches": max(min(c.steps_per_epoch, left), 1)}
        batches = ImageBatches(*self.source, **size, seed=c.seed, epoch=epoch)
        # spares the global stream
        return DataLoader(batches, batch_size=None, generator=torch.Generator())


class Training(pl.LightningModule):
    """What all trainings share: linear warm-up, cosine to zero, an exponential moving average of
    the weights.

    The average starts short and grows to `ema_decay`: min(decay, (1 + n)/(10 + n)) after n updates.
    """

    def __init__(self, net: nn.Module, config: TrainConfig) -> None:
        super().__init__()
        self.net, self.config = net, config
        self.num_steps = config.num_images // config.batch_size
        self.restart_average()
        # Not a submodule: a checkpoint holds the weights once, and does not depend on `compile`.
        self.__dict__["forward_net"] = torch.compile(net) if config.compile else net

    def restart_average(self) -> None:
        """Begins the average at the network as it is now."""

        def average(mean, value, n):
            decay = min(self.config.ema_decay, (1 + float(n)) / (10 + float(n)))
            return value + (mean - value) * decay

        self.ema = AveragedModel(self.net, avg_fn=average, use_buffers=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.build_optimizer()

        def factor(step):
            done = min(step / self.num_steps, 1.0)
            warm_up = min(1.0, (step + 1) / self.config.warmup_steps)
            return warm_up * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.config.seed * 1_000_003 + self.current_epoch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.ema.update_parameters(self.net)

    def build_optimizer(self) -> torch.optim.Optimizer:
        betas = 0.9, self.config.beta2
        return torch.optim.Adam(self.net.parameters(), lr=self.config.lr, betas=betas)

    def note(self, **means: torch.Tensor) -> None:
        """Logs the means over an epoch, by name."""
        self.log_dict(means, on_step=False, on_epoch=True)

    def draw_samples(self, path: Path) -> None:
        """Draws a picture of what has been learned so far, where there is one to draw."""

    def weights(self) -> dict[str, torch.Tensor]:
        """Returns the averaged weights by the names that they are shipped under."""
        return self.ema.module.state_dict()


def random_flip(x: torch.Tensor) -> torch.Tensor:
    """Mirrors every second image of x (N, C, H, W), on average."""
    flip = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
    return torch.where(flip, x.flip(3), x).contiguous(memory_format=torch.channels_last)


class Progress(pl.Callback):
    """Logs a line an epoch; draws loss curve and samples every `sample_every` epochs."""

    def __init__(self, folder: Path, sample_every: int) -> None:
        self.folder, self.sample_every = folder, sample_every
        self.rows: list[tuple[int, float]] = []  # images seen, loss
        self.started: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"rows": copy.copy(self.rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def on_train_epoch_start(self, trainer: pl.Trainer, module: Training) -> None:
        self.started = time.monotonic()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Training) -> None:
        if self.started is None:  # Lightning ends the saved epoch once more when it resumes
            return
        seconds, self.started = time.monotonic() - self.started, None
        loss = float(trainer.callback_metrics["loss"])
        images = trainer.global_step * module.config.batch_size
        self.rows.append((images, loss))
        left = (module.num_steps - trainer.global_step) / module.config.steps_per_epoch * seconds
        rate = module.config.steps_per_epoch * module.config.batch_size / seconds
        logging.getLogger("tinydm").info(
            f"images {images:>9,}  loss {loss:.4f}  {rate:.0f} images/s  {left / 60:.0f} min left"
        )
        if trainer.current_epoch % self.sample_every == self.sample_every - 1 or left <= 0:
            self.plot()
            module.draw_samples(self.folder / f"samples_{images:09d}.png")

    def plot(self) -> None:
        """Draws the loss curve so far."""
        figure = Figure(figsize=(6, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(*zip(*self.rows))
        highest = min(1.0, 1.2 * self.rows[0][1])
        axes.set(xlabel="images seen", ylabel="training loss", ylim=(0, highest))
        axes.grid(alpha=0.3)
        figure.savefig(self.folder / "loss.png", dpi=100)


def fit(
    module: Training, images: torch.Tensor, labels: torch.Tensor, folder: Path | str
) -> list[tuple[int, float]]:
    """Trains to the end, on from a checkpoint in `folder`; returns (images seen, loss) by epoch."""
    folder, config = Path(folder), module.config
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress(folder, config.sample_every)
    keep = pl.callbacks.ModelCheckpoint(
        folder, filename="last", enable_version_counter=False, save_on_train_epoch_end=True
    )
    # The end is told in epochs: Lightning resumes a run that is told in steps with the data of the
    # epoch before.
    num_epochs = math.ceil(module.num_steps / config.steps_per_epoch)
    trainer = pl.Trainer(
        max_epochs=num_epochs,
        accelerator=config.device,
        devices=1,
        precision=config.precision,
        gradient_clip_val=config.grad_clip,
        callbacks=[progress, keep],
        logger=False,
        reload_dataloaders_every_n_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data, last = Data(images, labels, config), folder / "last.ckpt"
    start = str(last) if last.exists() else None
    try:
        trainer.fit(module, datamodule=data, ckpt_path=start, weights_only=True)
    except SystemExit:  # Lightning ends the process on Ctrl-C; that is the script's to say
        raise KeyboardInterrupt from None
    return progress.rows

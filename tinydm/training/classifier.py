"""Training of the image classifier that offline scores are made with."""

import torch
import torch.nn.functional as F
from torch import nn

from tinydm.training.config import TrainConfig
from tinydm.training.loop import Batch, Training, random_flip


class ClassifierTraining(Training):
    """Cross-entropy with label smoothing; images flipped, shifted by 4 pixels, partly erased."""

    def __init__(self, net: nn.Module, config: TrainConfig) -> None:
        super().__init__(net.to(memory_format=torch.channels_last), config)

    def build_optimizer(self) -> torch.optim.Optimizer:
        rates = {"lr": self.config.lr, "momentum": 0.9, "weight_decay": self.config.weight_decay}
        return torch.optim.SGD(self.net.parameters(), nesterov=True, **rates)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        x, y = random_flip(batch[0].to(self.device).float() / 255), batch[1].to(self.device)
        x = self.erase(self.shift(x)).contiguous(memory_format=torch.channels_last)
        logits = self.forward_net.logits(x).float()
        loss = F.cross_entropy(logits, y, label_smoothing=0.1)
        self.note(loss=loss, accuracy=(logits.argmax(1) == y).float().mean())
        return loss

    @staticmethod
    def shift(x: torch.Tensor) -> torch.Tensor:
        """Moves square images x (N, C, H, H) by up to 4 pixels both ways, edges reflected."""
        line, images = (torch.arange(length, device=x.device) for length in (x.shape[2], len(x)))
        rows, cols = (torch.randint(0, 9, (len(x), 1), device=x.device) + line for _ in range(2))
        padded = F.pad(x, (4, 4, 4, 4), mode="reflect")
        moved = padded[images[:, None, None], :, rows[:, :, None], cols[:, None, :]]
        return moved.permute(0, 3, 1, 2)

    @staticmethod
    def erase(x: torch.Tensor, size: int = 8) -> torch.Tensor:
        """Greys one size x size square in each of x (N, C, H, W) (cutout, arXiv:1708.04552)."""
        spans = []
        for length in x.shape[2:]:
            start = torch.randint(0, length - size + 1, (len(x), 1), device=x.device)
            position = torch.arange(length, device=x.device)
            spans.append((position >= start) & (position < start + size))
        hole = spans[0][:, None, :, None] & spans[1][:, None, None, :]
        return x.masked_fill(hole, 0.45)

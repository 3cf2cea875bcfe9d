"""A small CIFAR-10 classifier: the feature extractor where Inception weights cannot be had.

Shaped like ResNet-9 (D. Page 2018, "How to train your ResNet"): few wide layers, max pooling after
the convolution that widens. 0.95 M parameters, so that the weights fit in 2 MB, and one CPU core
trains it in little more than an hour."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = 0.4734, 0.2515  # of all CIFAR-10 training values in [0, 1], all channels together


def conv(in_ch: int, out_ch: int) -> nn.Sequential:
    """Convolution, normalization, ReLU."""
    layer = nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(out_ch), nn.ReLU())


class Stage(nn.Module):
    """Wider and half as large, then a residual branch of `depth` convolutions."""

    def __init__(self, in_ch: int, out_ch: int, depth: int):
        super().__init__()
        self.widen = nn.Conv2d(in_ch, out_ch, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_ch)
        self.branch = nn.Sequential(*(conv(out_ch, out_ch) for _ in range(depth)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn(F.max_pool2d(self.widen(x), 2)))
        return x + self.branch(x)


class Classifier(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] -> features (N, widths[-1]) after the global mean, and class
    logits. In evaluation mode both are the mean over an image and its mirror image."""

    def __init__(
        self,
        stem_width: int = 24,
        widths: Sequence[int] = (64, 128, 136),
        depth: int = 2,
        num_classes: int = 10,
    ):
        super().__init__()
        self.stem = conv(3, stem_width)
        pairs = zip([stem_width, *widths], widths)
        self.stages = nn.Sequential(*(Stage(in_ch, out_ch, depth) for in_ch, out_ch in pairs))
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N, widths[-1])."""
        if not self.training:
            return (self.one_sided(x) + self.one_sided(x.flip(3))) / 2
        return self.one_sided(x)

    def one_sided(self, x: torch.Tensor) -> torch.Tensor:
        """Features of the images alone, without their mirror images."""
        return self.stages(self.stem((x - MEAN) / STD)).mean(dim=(2, 3))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> (N, num_classes)."""
        return self.head(self.features(x))


def build_classifier(**options: Any) -> Classifier:
    """The network of the arguments that a recipe or a file's metadata holds."""
    return Classifier(**options)

"""A small CIFAR-10 classifier: the feature extractor for scores where Inception weights cannot be had.

A residual network (He et al. 2016, pre-activation variant of identity blocks) of about 0.8 M parameters.
"""
import torch.nn.functional as F
from torch import nn

MEAN, STD = 0.4734, 0.2515                  # of all CIFAR-10 training values in [0, 1], all channels together


class Block(nn.Module):
    def __init__(self, in_ch, out_ch, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(in_ch, out_ch, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_ch)
        self.conv2 = nn.Conv2d(out_ch, out_ch, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_ch)
        self.shortcut = nn.Conv2d(in_ch, out_ch, 1, stride, bias=False) if stride != 1 or in_ch != out_ch else nn.Identity()

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class Classifier(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] -> features (N, widths[-1]) after the global mean, and class logits."""

    def __init__(self, widths=(24, 48, 96, 128), blocks=1, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        layers, in_ch = [], widths[0]
        for i, width in enumerate(widths):
            for j in range(blocks):
                layers.append(Block(in_ch, width, 2 if i and not j else 1))
                in_ch = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(in_ch, num_classes)

    def features(self, x):
        return self.blocks(self.stem((x - MEAN) / STD)).mean(dim=(2, 3))

    def logits(self, x):
        return self.head(self.features(x))


def build_classifier(**options):
    return Classifier(**options)

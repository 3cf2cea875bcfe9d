"""A small CIFAR-10 classifier: the feature extractor for scores where Inception weights cannot be had.

A residual network (He et al. 2016, "Deep Residual Learning") of 0.58 M parameters that halves the resolution at the
start of every stage, so that one CPU core trains it in under an hour.
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
        same = stride == 1 and in_ch == out_ch
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_ch, out_ch, 1, stride, bias=False)

    def forward(self, x):
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(h + self.shortcut(x))


class Classifier(nn.Module):
    """Images (N, 3, 32, 32) in [0, 1] -> features (N, widths[-1]) after the global mean, and class logits."""

    def __init__(self, stem_width=24, widths=(64, 96, 160), blocks=1, num_classes=10):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, stem_width, 3, 1, 1, bias=False), nn.BatchNorm2d(stem_width), nn.ReLU())
        layers, in_ch = [], stem_width
        for width in widths:
            for i in range(blocks):
                layers.append(Block(in_ch, width, 1 if i else 2))
                in_ch = width
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(in_ch, num_classes)

    def features(self, x):
        return self.blocks(self.stem((x - MEAN) / STD)).mean(dim=(2, 3))

    def logits(self, x):
        return self.head(self.features(x))


def build_classifier(**options):
    return Classifier(**options)

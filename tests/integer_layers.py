"""Shared by tests of quantized layers: layers of every kind, and their arithmetic in integers."""

import itertools

import torch
import torch.nn.functional as F
from tiny import normal
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.timeline import Timeline

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear over tokens": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=2), (4, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), (4, 6, 7, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 7, 8)),
    "conv2d strided": (
        lambda: nn.Conv2d(6, 5, (3, 2), stride=(2, 3), padding=(0, 1)),
        (4, 6, 7, 8),
    ),
}
SPLIT = "conv2d", (2, 4)


def build(case, weight, inputs, *, splits=None, timeline=None, balanced=False):
    torch.manual_seed(0)
    layer = tag("q", LAYERS[case][0](), **({"input_splits": splits} if splits else {}))
    x = normal(*LAYERS[case][1])
    if splits:
        x[:, splits[0] :] *= 5
    quant = QuantLayer(layer, weight, inputs, timeline or Timeline(), bool(splits), balanced)
    return layer, quant.requires_grad_(False), x


def integer_layer(x, weight, layer):
    """x (N, C, ...) and weight (O, C, ...) in int64: the sum over kernel offsets of matrix
    products."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    x = F.pad(x, [p for padding in reversed(layer.padding) for p in (padding, padding)])
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], weight.shape[2:], layer.stride)]
    out = 0
    for offset in itertools.product(*map(range, weight.shape[2:])):
        window = [slice(o, o + s * (n - 1) + 1, s) for o, s, n in zip(offset, layer.stride, counts)]
        part = x[(slice(None), slice(None), *window)]
        out = out + torch.einsum(
            "oc,nc...->no...", weight[(slice(None), slice(None), *offset)], part
        )
    return out


def integers(x, scale, zero_point, bits, symmetric):
    """Code minus zero point in int64."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    zero_point = zero_point.long()
    return (torch.round(x * (1 / scale)).long() + zero_point).clamp(low, high) - zero_point

"""Shared by tests of quant/export: a network whose export takes few seconds, and modules through
ONNX and ONNX Runtime."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import normal
from torch import nn

from base.network import Matmul, tag

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"{package} is not installed (extra export)")

from quant.export.files import traced  # noqa: E402
from quant.export.runtimes import OnnxRuntime  # noqa: E402

LITTLE = 4, 8, 8  # shape of a sample of the network below


class Little(nn.Module):
    """A convolution, a shortcut over a concatenation, the time, attention, a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = tag("stem", nn.Conv2d(4, 6, 3, padding=1))
        self.skip = tag("skip", nn.Conv2d(10, 6, 1), input_splits=(6, 4))
        self.temb = tag("temb", nn.Linear(2, 6))
        self.product = Matmul("q", "k")
        self.out = tag("out", nn.Conv2d(6, 4, 3, padding=1))

    def forward(self, x, t):
        h = self.skip(torch.cat([self.stem(x), x], dim=1))
        time = torch.stack([(t / 100).sin(), (t / 100).cos()], dim=1)
        h = F.silu(h + self.temb(time)[:, :, None, None]).flatten(2)
        h = h + self.product(h, h.transpose(1, 2)).softmax(dim=-1) @ h
        return self.out(h.unflatten(2, LITTLE[1:]))


class Several(nn.Module):
    """Modules that are each called with an input of their own shape, at the times t (N,) of the
    samples; one graph for all, as tracing takes seconds. Inputs and answers are one tensor each,
    (N, numbers)."""

    def __init__(self, modules, shapes, clock):
        super().__init__()
        self.all, self.shapes, self.clock = nn.ModuleList(modules), shapes, clock

    def forward(self, x, t):
        self.clock.set_time(t)
        parts = x.split([math.prod(shape) for shape in self.shapes], dim=1)
        inputs = (part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes))
        return torch.cat([m(part).flatten(1) for m, part in zip(self.all, inputs)], dim=1)


def answers(modules, clock, t, inputs, folder):
    """What each of the modules says by ONNX Runtime, one after the other, (N, numbers)."""
    several = Several(modules, [tuple(x.shape[1:]) for x in inputs], clock).eval()
    arguments = torch.cat([x.flatten(1) for x in inputs], dim=1), t
    (folder / "several.onnx").write_bytes(traced(several, arguments).SerializeToString())
    return OnnxRuntime(folder / "several.onnx", threads=1)(*arguments)


def little():
    """The network with fixed weights."""
    net = Little().eval().requires_grad_(False)
    for i, parameter in enumerate(net.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=i) / parameter[0].numel() ** 0.5)
    return net

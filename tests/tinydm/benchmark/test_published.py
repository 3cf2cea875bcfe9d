"""The forward of published code by hand, and beside our own simulation."""

import torch
from tiny import normal, rules
from torch import nn

from base.network import tag
from quant.convert import convert
from quant.network import fit, harden, observing
from tinydm.benchmark.published import on_grid, published_net


def hardened(net, *arguments, bits=8):
    quantized = convert(net, rules(bits, 8))
    with torch.no_grad(), observing(quantized):
        quantized(*arguments)
    fit(quantized)
    harden(quantized)
    return quantized


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        return self.layer(x)


def test_numbers_on_a_grid():
    net = hardened(OneLayer(nn.Linear(1, 1)), torch.tensor([[0.0], [255.0]]), torch.zeros(2))
    q = net.net.layer.input_quantizer  # scale 1, zero point 0
    x = torch.tensor([[-3.0], [0.4], [0.6], [300.0]])
    assert on_grid(x, q).flatten().tolist() == [0, 0, 1, 255]
    assert on_grid(x, None) is x


def test_weights_are_quantized_in_every_call():
    """Changed behind its back, a float weight counts at once, as it does in that code."""
    layer = nn.Conv2d(2, 3, 1, bias=False)
    net = OneLayer(layer)
    x, t = normal(4, 2, 3, 3), torch.zeros(4)
    quantized = hardened(net, x, t)
    published = published_net(net, quantized)
    before = published(x, t)
    layer.weight.data = layer.weight.data / 2
    assert (published(x, t) - before / 2).abs().max() < 0.05 * before.abs().max()
    assert torch.equal(quantized(x, t), quantized(x, t)) and type(net.layer) is nn.Conv2d


def test_parts_of_a_concatenation_have_their_own_grids():
    layer = tag("skip", nn.Conv2d(4, 3, 1), input_splits=(1, 3))
    net, t = OneLayer(layer).requires_grad_(False), torch.zeros(5)
    x = normal(5, 4, 2, 2) * torch.tensor([100.0, 1, 1, 1]).reshape(1, 4, 1, 1)
    quantized = hardened(net, x, t)
    a, b = published_net(net, quantized)(x, t), quantized(x, t)
    assert (a - b).abs().max() < 1e-4 * b.abs().max()


def test_a_network_answers_as_our_simulation_up_to_ties(tiny_net):
    x, t = normal(4, 3, 8, 8), torch.full((4,), 500.0)
    tiny_net.requires_grad_(False)
    quantized = hardened(tiny_net, x, t)
    a, b, full = published_net(tiny_net, quantized)(x, t), quantized(x, t), tiny_net(x, t)
    assert 0 < (a - b).norm() < (b - full).norm() < 0.1 * full.norm()

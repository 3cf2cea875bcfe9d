"""The quantized network as an object: it tells its quantizers the time, and so do its copies."""

import copy

import torch
from tiny import SHAPE, normal, quantized, rules

from quant.network import input_quantizers


def test_a_deep_copy_has_a_timeline_of_its_own(tiny_net, tmp_path):
    """A copy at t = 700 stands in segment 2, as the original would, which has not moved."""
    net = quantized(tiny_net, tmp_path, rules(8, 8), boundaries=[300, 600])
    early, late = torch.full((2,), 100.0), torch.full((2,), 700.0)
    x = normal(2, *SHAPE)
    expected = net(x, late)
    net(x, early)
    twin = copy.deepcopy(net)
    answer = twin(x, late)
    assert twin.timeline.segment == 2 and net.timeline.segment == 0
    assert torch.equal(answer, expected)
    for q in input_quantizers(twin).values():
        assert q.timeline is twin.timeline

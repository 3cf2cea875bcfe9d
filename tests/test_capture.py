"""Streaming from unit to unit equals complete forward passes; spilling and freeing change no number."""
import itertools

import pytest
import torch
from torch import nn

from quant.capture import Store, Stream, answering, capture_whole, last_uses
from quant.convert import trace, units_in_order
from tiny import EXAMPLE, normal, quantized, rules, samples

BATCH = 4                                                 # 10 samples: the last batch is smaller


def walk(net, folder, *, memory_gb=1.0):
    """Yields (unit, inputs, output, store) along the whole network, dropping what is dead."""
    calibration, order = samples(), trace(net, EXAMPLE) if not hasattr(net, "timeline") else net.order
    units, store = units_in_order(net, order), Store(memory_gb, folder)
    uses = last_uses(net, units, calibration.arguments(slice(0, 1)))
    stream = Stream(net, units, uses, calibration, batch_size=BATCH,
                    store=store)
    for unit in units:
        inputs = stream.inputs(unit)
        output = stream.advance(unit, inputs)
        yield unit, inputs, output, store
        stream.free(inputs)
        stream.drop_dead(unit)


@pytest.fixture(params=["float", "quantized", "quantized, with segments"])
def net(request, tiny_net, tmp_path):
    if request.param == "float":
        return tiny_net
    net = quantized(tiny_net, tmp_path, rules(4, 8), boundaries=[500] if "segments" in request.param else [])
    net.order = trace(tiny_net, EXAMPLE)
    return net


def test_stream_equals_whole_network_capture_bit_for_bit(net, tmp_path):
    for unit, inputs, output, _ in walk(net, tmp_path):
        whole_inputs, whole_output = capture_whole(net, unit, samples(), BATCH)
        assert len(inputs) == len(whole_inputs) and all(map(torch.equal, inputs, whole_inputs)), unit
        assert torch.equal(output, whole_output), unit


def test_network_is_as_before_after_a_walk(tiny_net, tmp_path):
    x, t = samples().x, samples().t
    before = tiny_net(x, t)
    last = [output for _, _, output, _ in walk(tiny_net, tmp_path)][-1]
    assert torch.equal(tiny_net(x, t), before)
    torch.testing.assert_close(last, before, rtol=1e-5, atol=1e-6)
    assert all("forward" not in vars(m) for m in tiny_net.modules())


def test_spilled_bytes_equal_those_in_memory_and_leave_no_file(tiny_net, tmp_path):
    folder = tmp_path / "spill"
    for (unit, inputs, output, _), (_, others, other, store) in zip(walk(tiny_net, tmp_path),
                                                                    walk(tiny_net, folder, memory_gb=0)):
        assert torch.equal(output, other) and all(map(torch.equal, inputs, others)), unit
        assert list(folder.iterdir()) == []
    assert store.used == store.peak == 0 and store.spilled > 0


def test_dead_outputs_are_freed(tiny_net, tmp_path):
    everything = 0
    for _, inputs, output, store in walk(tiny_net, tmp_path):
        everything += 4 * sum(tensor.numel() for tensor in (*inputs, output))
    assert store.used == 0
    assert 0 < store.peak < everything / 3


def test_store_spills_only_what_is_over_its_budget(tmp_path):
    store = Store(100 / 2 ** 30, tmp_path)
    first, second = store.empty((5, 4)), store.empty((2, 3))
    assert (store.used, store.peak, store.spilled) == (80, 80, 24)
    store.free(second)
    assert store.used == 80                               # what was spilled is not counted
    store.free(first)
    assert (store.used, store.peak) == (0, 80) and store.empty((25,)).shape == (25,) and store.spilled == 24


class Graph(nn.Module):
    """a -> b -> c, d reads a and c, e reads b; the result reads d and e."""

    def __init__(self):
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x, t):
        a = self.a(x)
        b = self.b(a).relu()
        c = self.c(b * 2)
        d = self.d(a + c)
        return d + self.e(b)


def test_last_uses_of_a_known_graph():
    found = last_uses(Graph(), list("abcde"), [normal(1, 3), torch.zeros(1)])
    assert found == {"a": 3, "b": 4, "c": 3, "d": 3, "e": 4}


def test_outputs_live_as_long_as_somebody_reads_them():
    graph, units = Graph().requires_grad_(False), list("abcde")
    calibration = type(samples())(normal(5, 3), torch.zeros(5))
    uses = last_uses(graph, units, calibration.arguments(slice(0, 1)))
    stream = Stream(graph, units, uses, calibration, batch_size=2,
                    store=Store(1, "unused"))
    alive = []
    for unit in units:
        stream.advance(unit, stream.inputs(unit))
        stream.drop_dead(unit)
        alive.append("".join(stream.outputs))
    assert alive == ["a", "ab", "abc", "b", ""]


def test_answers_are_taken_back_after_an_error():
    graph = Graph()
    with pytest.raises(RuntimeError, match="stop"), answering(dict(graph.named_modules()), {"a": lambda x: 7}):
        assert graph.a(None) == 7
        raise RuntimeError("stop")
    assert torch.equal(graph.a(torch.zeros(3)), graph.a.bias)


def test_skips_of_the_u_net_live_until_the_way_up(tiny_net):
    units, calibration = units_in_order(tiny_net, trace(tiny_net, EXAMPLE)), samples()
    last = last_uses(tiny_net, units, calibration.arguments(slice(0, 1)))
    reader = {unit: units[index] for unit, index in last.items()}
    assert reader["conv_in"] == "up.0.block.1" and reader["down.0.block.0"] == "up.0.block.0"
    assert reader["down.0.downsample.conv"] == "up.1.block.1" and reader["down.1.attn.0"] == "up.1.block.0"
    assert reader["temb.dense.1"] == "up.0.block.1" and reader["temb.dense.0"] == "temb.dense.1"
    for unit, following in itertools.pairwise(["mid.block_1", "mid.attn_1", "mid.block_2", "up.1.block.0"]):
        assert reader[unit] == following

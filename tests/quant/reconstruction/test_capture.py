"""Streaming from unit to unit equals complete forward passes; spilling and freeing change no
number."""

import pytest
import torch
from tiny import EXAMPLE, Wired, capture_whole, normal, quantized, rules, samples

from quant.graph import trace
from quant.reconstruction.capture import Store, Stream, answering

BATCH = 4  # 10 samples: the last batch is smaller


def walk(net, folder, *, memory_gb=1.0):
    """Yields (unit, inputs, output, store) along the whole network, dropping what is dead."""
    graph, store = (
        net.graph if hasattr(net, "graph") else trace(net, EXAMPLE),
        Store(memory_gb, folder),
    )
    stream = Stream(net, graph.units, graph.last_use, samples(), batch_size=BATCH, store=store)
    for unit in graph.units:
        inputs = stream.inputs(unit)
        output = stream.advance(unit, inputs)
        yield unit, inputs, output, store
        stream.free(inputs)
        stream.drop_dead(unit)


@pytest.fixture(params=["float", "quantized", "quantized, with segments"])
def net(request, tiny_net, tmp_path):
    if request.param == "float":
        return tiny_net
    net = quantized(
        tiny_net, tmp_path, rules(4, 8), boundaries=[500] if "segments" in request.param else []
    )
    net.graph = trace(tiny_net, EXAMPLE)
    return net


def test_stream_equals_whole_network_capture_bit_for_bit(net, tmp_path):
    for unit, inputs, output, _ in walk(net, tmp_path):
        whole_inputs, whole_output = capture_whole(net, unit, samples(), BATCH)
        assert len(inputs) == len(whole_inputs) and all(map(torch.equal, inputs, whole_inputs)), (
            unit
        )
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
    for (unit, inputs, output, _), (_, others, other, store) in zip(
        walk(tiny_net, tmp_path), walk(tiny_net, folder, memory_gb=0)
    ):
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
    store = Store(100 / 2**30, tmp_path)
    first, second = store.empty((5, 4)), store.empty((2, 3))
    assert (store.used, store.peak, store.spilled) == (80, 80, 24)
    store.free(second)
    assert store.used == 80  # what was spilled is not counted
    store.free(first)
    assert (
        (store.used, store.peak) == (0, 80)
        and store.empty((25,)).shape == (25,)
        and store.spilled == 24
    )


def test_outputs_live_as_long_as_somebody_reads_them():
    graph, units = Wired().requires_grad_(False), list("abcde")
    calibration = type(samples())(normal(5, 3), torch.zeros(5))
    uses = trace(graph, calibration.arguments(slice(0, 1))).last_use
    stream = Stream(graph, units, uses, calibration, batch_size=2, store=Store(1, "unused"))
    alive = []
    for unit in units:
        stream.advance(unit, stream.inputs(unit))
        stream.drop_dead(unit)
        alive.append("".join(stream.outputs))
    assert alive == ["a", "ab", "abc", "b", ""]


def test_answers_are_taken_back_after_an_error():
    graph = Wired()
    with (
        pytest.raises(RuntimeError, match="stop"),
        answering(dict(graph.named_modules()), {"a": lambda x: 7}),
    ):
        assert graph.a(None) == 7
        raise RuntimeError("stop")
    assert torch.equal(graph.a(torch.zeros(3)), graph.a.bias)

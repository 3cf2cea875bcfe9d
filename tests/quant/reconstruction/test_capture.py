"""Streaming from unit to unit equals complete forward passes; spilling, giving outputs up and
computing them again change no number."""

import pytest
import torch
from tiny import EXAMPLE, Wired, capture_whole, normal, quantized, rules, samples, walk

from quant.graph import trace
from quant.reconstruction.capture import Stream, answering
from quant.reconstruction.store import Store

BATCH = 4  # 10 samples: the last batch is smaller


def steps(net, folder, *, memory_gb=1.0, keep=None, dtype=torch.float32):
    """Yields (unit, inputs, output, store) along the whole network."""
    graph, store = trace_of(net), Store(memory_gb, folder, dtype)
    for unit, ((inputs, output),) in walk([net], graph, samples(), store, keep, BATCH):
        yield unit, inputs, output, store


@pytest.fixture(params=["float", "quantized", "quantized, with segments"])
def net(request, tiny_net, tmp_path):
    if request.param == "float":
        return tiny_net
    net = quantized(
        tiny_net, tmp_path, rules(4, 8), boundaries=[500] if "segments" in request.param else []
    )
    net.graph = trace(tiny_net, EXAMPLE)
    return net


def trace_of(net):
    return net.graph if hasattr(net, "graph") else trace(net, EXAMPLE)


def assert_equals_whole_capture(net, unit, inputs, output):
    whole_inputs, whole_output = capture_whole(net, unit, samples(), BATCH)
    assert len(inputs) == len(whole_inputs) and all(map(torch.equal, inputs, whole_inputs)), unit
    assert torch.equal(output, whole_output), unit


def test_stream_equals_whole_network_capture_bit_for_bit(net, tmp_path):
    for unit, inputs, output, _ in steps(net, tmp_path):
        assert_equals_whole_capture(net, unit, inputs, output)


def test_outputs_that_are_computed_again_are_the_same_bit_for_bit(net, tmp_path):
    """Nothing is kept any further than the next unit: every skip is computed again from x."""
    keep = {unit: i + 1 for i, unit in enumerate(trace_of(net).units)}
    for unit, inputs, output, store in steps(net, tmp_path, keep=keep):
        assert_equals_whole_capture(net, unit, inputs, output)
    assert store.account.peak_memory < peak_of(net, tmp_path)


def peak_of(net, folder):
    return [store for *_, store in steps(net, folder)][-1].account.peak_memory


def test_bfloat16_is_near(tiny_net, tmp_path):
    for unit, inputs, output, _ in steps(tiny_net, tmp_path, dtype=torch.bfloat16):
        _, whole = capture_whole(tiny_net, unit, samples(), BATCH)
        found = output[slice(0, len(output))]
        assert found.dtype == torch.float32 and not torch.equal(found, whole)
        assert (found - whole).square().mean() < 1e-4 * whole.square().mean(), unit


def test_network_is_as_before_after_a_walk(tiny_net, tmp_path):
    x, t = samples().x, samples().t
    before = tiny_net(x, t)
    keep = {unit: i + 1 for i, unit in enumerate(trace_of(tiny_net).units)}
    last = [output for _, _, output, _ in steps(tiny_net, tmp_path, keep=keep)][-1]
    assert torch.equal(tiny_net(x, t), before)
    torch.testing.assert_close(last, before, rtol=1e-5, atol=1e-6)
    assert all("forward" not in vars(m) for m in tiny_net.modules())


def test_spilled_bytes_equal_those_in_memory_and_leave_no_file(tiny_net, tmp_path):
    folder = tmp_path / "spill"
    for (unit, inputs, output, _), (_, others, other, store) in zip(
        steps(tiny_net, tmp_path), steps(tiny_net, folder, memory_gb=0)
    ):
        assert torch.equal(output, other) and all(map(torch.equal, inputs, others)), unit
        assert list(folder.iterdir()) == []
    assert store.account.peak_memory == 0 and store.account.peak_disk > 0


def test_what_nobody_reads_any_more_is_freed(tiny_net, tmp_path):
    everything = 0
    for _, inputs, output, store in steps(tiny_net, tmp_path):
        everything += 4 * sum(tensor.numel() for tensor in (*inputs, output))
    assert store.account.memory == 4 * output.numel()  # the last one's
    assert 0 < store.account.peak_memory < everything / 3


def test_an_input_that_is_an_output_is_not_copied(tiny_net, tmp_path):
    outputs = {}
    for unit, inputs, output, _ in steps(tiny_net, tmp_path):
        if unit == "mid.attn_1":
            assert inputs[0] is outputs["mid.block_1"]
        outputs[unit] = output


def test_outputs_live_as_long_as_somebody_reads_them():
    net, calibration = Wired().requires_grad_(False), type(samples())(normal(5, 3), torch.zeros(5))
    graph = trace(net, calibration.arguments(slice(0, 1)))
    stream = Stream(net, graph, calibration, batch_size=2, store=Store(1, "unused"))
    alive = []
    for unit in graph.units:
        inputs = stream.inputs(unit)
        alive.append("".join(stream.outputs))
        stream.advance(unit, inputs)
    assert alive == ["", "a", "ab", "b", ""]


def test_answers_are_taken_back_after_an_error():
    graph = Wired()
    with (
        pytest.raises(RuntimeError, match="stop"),
        answering(dict(graph.named_modules()), {"a": lambda x: 7}),
    ):
        assert graph.a(None) == 7
        raise RuntimeError("stop")
    assert torch.equal(graph.a(torch.zeros(3)), graph.a.bias)

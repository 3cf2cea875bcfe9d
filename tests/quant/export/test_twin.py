"""What is exported answers as the definition does: layers, products, whole networks."""

import pytest
import torch
from conftest import assert_close
from exported import LITTLE, answers, little
from integer_layers import LAYERS, SPLIT, build
from tiny import fit, normal, quantized, rules

from base.network import Matmul
from quant import network
from quant.convert import convert
from quant.export.files import write_onnx
from quant.export.grids import BY_TIME, Clock, FloatGrid
from quant.export.runtimes import OnnxRuntime
from quant.export.twin import Layer, Portable, Product, SteppedLayer
from quant.layers import QuantMatmul
from quant.network import Bypass, observing
from quant.quantizer import Quantizer
from quant.spec import QuantSpec
from quant.timeline import Timeline

W4A8 = QuantSpec(bits=4, per="channel"), QuantSpec(bits=8)
W8A8 = QuantSpec(bits=8, per="channel"), QuantSpec(bits=8)  # whose integers leave int8
SIGNED = QuantSpec(bits=3, symmetric=True), QuantSpec(bits=4, symmetric=True)
# layers, then what else `build` takes; each kind of layer, and each specification of linear layers
# and of convolutions, as every layer of a graph takes seconds to trace
CASES = [
    ("linear", *W8A8, {}),
    ("linear over tokens", *W4A8, {}),
    ("linear without bias", *SIGNED, {}),
    ("conv1d", *W4A8, {}),
    ("conv2d", *SIGNED, {}),
    ("conv2d", *W4A8, {"balanced": True}),
    ("conv2d strided", *W4A8, {}),
    (SPLIT[0], *W8A8, {"splits": SPLIT[1]}),
]
assert {case for case, *_ in CASES} == LAYERS.keys() - {"conv2d 1x1"}
ONE_SIDED = [
    ("conv2d", W4A8[0], QuantSpec(), {}),
    ("linear", QuantSpec(), W4A8[1], {}),
    ("conv2d", W8A8[0], QuantSpec(bits=8, per="channel"), {}),
]


def layers(cases, timeline):
    """-> unfitted layers, their inputs of 4 samples."""
    found = (build(case, *spec, timeline=timeline, **more)[1:] for case, *spec, more in cases)
    return zip(*found)


def assert_alike(modules, twins, clock, t, inputs, tmp_path, tolerance=2e-6):
    found = answers(twins, clock, t, inputs, tmp_path)
    for module, x in zip(modules, inputs):
        expected = module(x).flatten(1)
        assert_close(found[:, : expected.shape[1]], expected, tolerance)
        found = found[:, expected.shape[1] :]
    assert found.shape[1] == 0


@torch.no_grad()
def test_layers_of_one_scale_answer_as_they_are_defined(tmp_path):
    timeline = Timeline()
    modules, inputs = layers(CASES + ONE_SIDED, timeline)
    for layer, x in zip(modules, inputs):
        fit(layer, x).harden()
    assert any(layer.weight_int is not None and layer.weight_int.max() > 127 for layer in modules)
    clock = Clock(timeline)
    twins = [Layer(layer, clock) for layer in modules]
    assert_alike(modules, twins, clock, torch.zeros(4), inputs, tmp_path)


@torch.no_grad()
def test_layers_with_tables_answer_each_sample_by_its_own_time(tmp_path):
    """Four samples in three segments, whose zero points lie at either end and between."""
    timeline, t = Timeline([300, 600]), torch.tensor([10.0, 300.0, 999.0, 599.0])
    modules, inputs = layers(CASES, timeline)
    for layer in modules:
        layer.fit_weight()
        layer.harden()
        q = layer.input_quantizer
        largest = 2**q.spec.bits - 1
        q.scale.copy_(torch.tensor([[0.02], [0.05], [0.011]]) * 255 / largest)
        zero_points = torch.tensor([[0.0], [largest // 2], [largest]]) * (not q.spec.symmetric)
        q.zero_point.copy_(zero_points.expand_as(q.scale))
    timeline.set_time(t)
    clock = Clock(timeline)
    twins = [SteppedLayer(layer, clock) for layer in modules]
    # an answer is a difference of numbers that may be many times as large
    assert_alike(modules, twins, clock, t, inputs, tmp_path, tolerance=1e-5)


class Pair(torch.nn.Module):
    """A product of one input, itself and turned."""

    def __init__(self, product):
        super().__init__()
        self.product = product

    def forward(self, x):
        return self.product(x, x.transpose(-2, -1))


@torch.no_grad()
def test_products_answer_as_they_are_defined(tmp_path):
    specs = [
        (QuantSpec(bits=8), QuantSpec(bits=8)),
        (QuantSpec(bits=8, per="head"), QuantSpec(bits=4)),
        (QuantSpec(bits=8, grid="log2"), QuantSpec()),
        (QuantSpec(bits=16), QuantSpec(bits=8)),
    ]
    timeline, inputs = Timeline(), [normal(4, 2, 5, 3, seed=i).softmax(-1) for i in range(4)]
    modules = [QuantMatmul(Matmul("q", "k", num_heads=2), list(pair), timeline) for pair in specs]
    for module, x in zip(modules, inputs):
        fit(module, x, x.transpose(-2, -1))
    clock = Clock(timeline)
    twins = [Pair(Product(module, clock)) for module in modules]
    assert_alike(map(Pair, modules), twins, clock, torch.zeros(4), inputs, tmp_path)


@torch.no_grad()
def test_float_grids_have_widths_that_differ_by_time():
    timeline, t = Timeline([500]), torch.tensor([100.0, 900.0])
    q = Quantizer(QuantSpec(bits=8, segment_bits=(8, 2)), torch.tensor(0), timeline)
    q.scale.copy_(torch.tensor([[0.01], [0.5]]))
    q.zero_point.copy_(torch.tensor([[100.0], [1.0]]))
    clock, x = Clock(timeline), normal(2, 50)
    timeline.set_time(t)
    clock.set_time(t)
    found = FloatGrid(q, clock)(x)
    assert torch.equal(found, q(x)) and len(found[1].unique()) == 4


@pytest.mark.parametrize("boundaries", [[], [300, 600]])
@torch.no_grad()
def test_networks_answer_as_they_are_defined(boundaries, tmp_path):
    """Roundings at ties fall otherwise here and there, which later layers carry on: far less than
    what quantization changes. The bypass is in it."""
    original, x, t = little(), normal(30, *LITTLE, seed=5), torch.linspace(0, 999, 30)
    net = convert(original, rules(4, 8), Timeline(boundaries))
    with observing(net):
        net(x, t)
    network.fit(net)
    network.harden(net)
    net.bypass = Bypass(net.timeline, 4, 4)
    net.bypass.gain.copy_(normal(*net.bypass.gain.shape))
    floating = write_onnx(tmp_path / "net.onnx", net, (x, t))
    expected, found = net(x, t), OnnxRuntime(tmp_path / "net.onnx", threads=1)(x, t)
    by_bits = (original(x, t) - expected).std()
    assert (found - expected).std() < 0.1 * by_bits
    assert floating == ({BY_TIME: ["product"]} if boundaries else {})


def test_what_one_graph_cannot_hold_is_refused_or_named(tiny_net, tmp_path):
    net = convert(tiny_net, rules(4, 8))
    with pytest.raises(ValueError, match="the weight of .* is not an integer yet"):
        Portable(net)
    by_segment = rules(4, 8)
    by_segment[0]["weight"]["per_segment"] = True
    net = convert(tiny_net, by_segment, Timeline([500]))
    with pytest.raises(ValueError, match="own weights for every time segment"):
        Portable(net)
    by_channel = rules(4, 8)
    by_channel.append({"role": "conv1", "input": {"per": "channel"}})
    net = quantized(tiny_net, tmp_path, by_channel)
    floating = Portable(net).floating
    assert list(floating) == ["scales per channel"]
    assert all(name.endswith("conv1") for name in floating["scales per channel"])

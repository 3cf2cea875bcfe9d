"""Quantized layers: the hardened forward, bit for bit, in integer arithmetic written out here."""
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import assert_close
from ddim.unet import Matmul, tag
from quant.layers import QuantLayer, QuantMatmul
from quant.quantizer import QuantSpec
from quant.timeline import Timeline
from tiny import fit, normal

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear over tokens": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=2), (4, 6, 11)),
    "conv2d": (lambda: nn.Conv2d(6, 5, 3, padding=1), (4, 6, 7, 8)),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 5, 1), (4, 6, 7, 8)),
    "conv2d strided": (lambda: nn.Conv2d(6, 5, (3, 2), stride=(2, 3), padding=(0, 1)), (4, 6, 7, 8)),
}
SPLIT = "conv2d", (2, 4)


def build(case, weight, inputs, *, splits=None, timeline=None):
    torch.manual_seed(0)
    layer = tag("x", LAYERS[case][0](), **({"input_splits": splits} if splits else {}))
    x = normal(*LAYERS[case][1])
    if splits:
        x[:, splits[0]:] *= 5
    return layer, QuantLayer(layer, weight, inputs, timeline or Timeline(), bool(splits)).requires_grad_(False), x


def integer_layer(x, weight, layer):
    """x (N, C, ...) and weight (O, C, ...) in int64: the sum over kernel offsets of matrix products."""
    if isinstance(layer, nn.Linear):
        return x @ weight.T
    x = F.pad(x, [p for padding in reversed(layer.padding) for p in (padding, padding)])
    counts = [(n - k) // s + 1 for n, k, s in zip(x.shape[2:], weight.shape[2:], layer.stride)]
    out = 0
    for offset in itertools.product(*map(range, weight.shape[2:])):
        window = [slice(o, o + s * (n - 1) + 1, s) for o, s, n in zip(offset, layer.stride, counts)]
        part = x[(slice(None), slice(None), *window)]
        out = out + torch.einsum("oc,nc...->no...", weight[(slice(None), slice(None), *offset)], part)
    return out


def integers(x, scale, zero_point, bits, symmetric):
    """Code minus zero point in int64."""
    low, high = (-2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2 ** bits - 1)
    zero_point = zero_point.long()
    return (torch.round(x * (1 / scale)).long() + zero_point).clamp(low, high) - zero_point


@pytest.mark.parametrize("bits, symmetric", [(8, False), (4, False), (8, True), (2, True)])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("case", LAYERS)
def test_hardened_layer_is_integer_arithmetic_bit_for_bit(case, per, bits, symmetric):
    """conv(q_x - z_x, w_int) * s_x * s_w + b"""
    layer, quant, x = build(case, QuantSpec(bits=bits, per=per, symmetric=symmetric),
                            QuantSpec(bits=bits, symmetric=symmetric))
    fit(quant, x).harden()
    s_x, s_w, column = quant.input_quantizer.scale[0, 0], quant.weight_quantizer.scale[0], [-1, *[1] * (x.dim() - 2)]
    if isinstance(layer, nn.Linear):
        column = [-1]
    rows = [-1, *[1] * (layer.weight.dim() - 1)]
    codes = integers(x, s_x, quant.input_quantizer.zero_point[0, 0], bits, symmetric)
    z_w = quant.weight_quantizer.zero_point[0]
    weight = integers(layer.weight.detach(), s_w.reshape(rows), z_w.reshape(rows), bits, symmetric)
    assert torch.equal(quant.weight_int, weight.float())
    expected = integer_layer(codes, weight, layer).float() * s_x * s_w.reshape(column)
    if layer.bias is not None:
        expected = expected + layer.bias.detach().reshape(column)
    assert torch.equal(quant(x), expected)
    if bits == 8:
        assert_close(quant(x), layer(x).detach(), 0.03)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_hardened_split_layer_is_a_sum_of_integer_products_bit_for_bit(per):
    """conv(q_0 - z_0, w_0) * s_x0 * s_w0 + conv(q_1 - z_1, w_1) * s_x1 * s_w1 + b"""
    layer, quant, x = build(SPLIT[0], QuantSpec(bits=8, per=per), QuantSpec(bits=8), splits=SPLIT[1])
    fit(quant, x).harden()
    rows = 5 if per == "channel" else 1
    out, start = 0, 0
    for part, width in enumerate(SPLIT[1]):
        x_part, w_part = x[:, start:start + width], layer.weight.detach()[:, start:start + width]
        q, w = quant.input_quantizer, quant.weight_quantizer
        low, high = min(x_part.min(), torch.tensor(0.0)), x_part.max()
        assert torch.equal(q.scale[0, part], (high - low) / 255)           # each half has a range of its own
        s_w, z_w = (v[0, part * rows:(part + 1) * rows].reshape(-1, 1, 1, 1) for v in (w.scale, w.zero_point))
        product = integer_layer(integers(x_part, q.scale[0, part], q.zero_point[0, part], 8, False),
                                integers(w_part, s_w, z_w, 8, False), layer).float()
        term = product * q.scale[0, part] * s_w.reshape(-1, 1, 1)
        out, start = term if part == 0 else out + term, start + width
    assert torch.equal(quant(x), out + layer.bias.detach().reshape(-1, 1, 1))
    assert_close(quant(x), layer(x).detach(), 0.03)


@pytest.mark.parametrize("inputs", [dict(per="channel"), dict(per="group", group_size=2)], ids=["channel", "group"])
def test_scales_that_vary_inside_the_sum_multiply_the_codes(inputs):
    """conv((q_x - z_x) * s_x, w_int) * s_w + b"""
    layer, quant, x = build("conv2d", QuantSpec(bits=4, per="channel"), QuantSpec(bits=4, **inputs))
    fit(quant, x).harden()
    q, of = quant.input_quantizer, quant.input_quantizer.group_of
    codes = integers(x, q.scale[0][of], q.zero_point[0][of], 4, False)
    scaled = codes.float() * q.scale[0][of]
    expected = F.conv2d(scaled, quant.weight_int, padding=1) * quant.weight_quantizer.scale[0].reshape(-1, 1, 1)
    assert torch.equal(quant(x), expected + layer.bias.detach().reshape(-1, 1, 1))
    exact = F.conv2d(codes.double() * q.scale[0][of].double(), quant.weight_int.double(), padding=1)
    assert_close(expected, (exact * quant.weight_quantizer.scale[0].reshape(-1, 1, 1)).float(), 1e-6)


@pytest.mark.parametrize("case, splits", [("linear", None), ("conv2d strided", None), SPLIT])
def test_hardening_keeps_the_output_of_nearest_rounding(case, splits):
    layer, quant, x = build(case, QuantSpec(bits=4, per="channel"), QuantSpec(bits=6), splits=splits)
    before = fit(quant, x)(x)
    quant.harden()
    assert quant.weight is None and quant.rounding is None
    assert_close(quant(x), before, 1e-6)
    again = quant.weight_int
    quant.harden()
    assert quant.weight_int is again


def test_split_layer_at_32_bits_is_the_plain_layer():
    layer, quant, x = build(SPLIT[0], QuantSpec(), QuantSpec(), splits=SPLIT[1])
    assert len(quant.parts) == 2
    assert_close(quant(x), layer(x).detach(), 1e-6)


@pytest.mark.parametrize("case, splits", [("linear over tokens", None), ("conv1d", None), SPLIT])
def test_mixed_steps_in_a_batch_equal_the_samples_one_by_one(case, splits):
    timeline, steps = Timeline([300, 600]), torch.tensor([0.0, 500.0, 900.0, 500.0])
    _, quant, x = build(case, QuantSpec(bits=8, per="channel"), QuantSpec(bits=8), splits=splits, timeline=timeline)
    timeline.set_time(steps)
    x = x * (1 + steps).reshape(-1, *[1] * (x.dim() - 1))
    fit(quant, x).harden()
    assert len(quant.input_quantizer.scale.unique(dim=0)) == 3
    together = quant(x)
    for i, t in enumerate(steps):
        timeline.set_time(t[None])
        assert torch.equal(together[i:i + 1], quant(x[i:i + 1]))


def test_padding_is_an_exact_zero():
    layer, quant, _ = build("conv2d", QuantSpec(bits=8), QuantSpec(bits=8))
    x = normal(2, 6, 7, 8).abs() + 3                      # nowhere near zero
    fit(quant, x).harden()
    inner = F.conv2d(F.pad(quant.input_quantizer(x), (1, 1, 1, 1)),
                     quant.weight_int * quant.weight_quantizer.scale[0, 0]) + layer.bias.detach()[:, None, None]
    assert_close(quant(x), inner, 1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_product_of_two_quantized_activations_bit_for_bit(symmetric):
    """(q_a - z_a) @ (q_b - z_b) * s_a * s_b"""
    spec, a, b = QuantSpec(bits=8, symmetric=symmetric), normal(3, 4, 6), normal(3, 6, 5, seed=1).abs()
    product = fit(QuantMatmul(Matmul("q", "k"), [spec, spec], Timeline()), a, b)
    qa, qb = product.a_quantizer, product.b_quantizer
    codes = [integers(x, q.scale[0, 0], q.zero_point[0, 0], 8, symmetric) for x, q in ((a, qa), (b, qb))]
    assert torch.equal(product(a, b), (codes[0] @ codes[1]).float() * qa.scale[0, 0] * qb.scale[0, 0])
    assert_close(product(a, b), a @ b, 0.03)


def test_product_with_one_operand_left_alone():
    a, b = normal(3, 4, 6), normal(3, 6, 5, seed=1)
    product = fit(QuantMatmul(Matmul("q", "k"), [QuantSpec(), QuantSpec(bits=4)], Timeline()), a, b)
    q = product.b_quantizer
    assert product.a_quantizer is None
    assert torch.equal(product(a, b), a @ q.codes(b) * q.scale[0, 0])


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="grouped convolutions"):
        QuantLayer(tag("x", nn.Conv2d(4, 4, 3, groups=2)), QuantSpec(bits=8), QuantSpec(), Timeline(), False)
    with pytest.raises(ValueError, match="per tensor or per head, not 'per: channel'"):
        QuantMatmul(Matmul("q", "k"), [QuantSpec(bits=8, per="channel"), QuantSpec()], Timeline())


@pytest.mark.parametrize("heads", [1, 3])
def test_product_per_head_equals_a_loop_over_heads(heads):
    a, b = normal(2, heads, 5, 4), normal(2, heads, 4, 6, seed=1) * torch.arange(1.0, heads + 1)[:, None, None]
    spec = QuantSpec(bits=4, per="head")
    product = fit(QuantMatmul(Matmul("q", "k", num_heads=heads), [spec, spec], Timeline()), a, b)
    assert product.a_quantizer.scale.shape == (1, heads)
    single = [fit(QuantMatmul(Matmul("q", "k"), [QuantSpec(bits=4)] * 2, Timeline()), a[:, h], b[:, h])
              for h in range(heads)]
    expected = torch.stack([one(a[:, h], b[:, h]) for h, one in enumerate(single)], dim=1)
    assert torch.equal(product(a, b), expected)

"""Quantized layers: the hardened forward, bit for bit, in integer arithmetic."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from integer_layers import LAYERS, SPLIT, build, integer_layer, integers
from tiny import fit, normal
from torch import nn

from base.network import Matmul, tag
from ddim.unet import Downsample
from quant.layers import QuantLayer, QuantMatmul
from quant.spec import QuantSpec
from quant.timeline import Timeline


@pytest.mark.parametrize("bits, symmetric", [(8, False), (4, False), (8, True), (2, True)])
@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("case", LAYERS)
def test_hardened_layer_is_integer_arithmetic_bit_for_bit(case, per, bits, symmetric):
    """conv(q_x - z_x, w_int) * (s_x * s_w) + b"""
    layer, quant, x = build(
        case,
        QuantSpec(bits=bits, per=per, symmetric=symmetric),
        QuantSpec(bits=bits, symmetric=symmetric),
    )
    fit(quant, x).harden()
    s_x, s_w, column = (
        quant.input_quantizer.scale[0, 0],
        quant.weight_quantizer.scale[0],
        [-1, *[1] * (x.dim() - 2)],
    )
    if isinstance(layer, nn.Linear):
        column = [-1]
    rows = [-1, *[1] * (layer.weight.dim() - 1)]
    codes = integers(x, s_x, quant.input_quantizer.zero_point[0, 0], bits, symmetric)
    z_w = quant.weight_quantizer.zero_point[0]
    weight = integers(layer.weight.detach(), s_w.reshape(rows), z_w.reshape(rows), bits, symmetric)
    assert torch.equal(quant.weight_int, weight.float())
    expected = integer_layer(codes, weight, layer).float() * (s_x * s_w.reshape(column))
    if layer.bias is not None:
        expected = expected + layer.bias.detach().reshape(column)
    assert torch.equal(quant(x), expected)
    if bits == 8:
        assert_close(quant(x), layer(x).detach(), 0.03)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_hardened_split_layer_is_a_sum_of_integer_products_bit_for_bit(per):
    """conv(q_0 - z_0, w_0) * s_x0 * s_w0 + conv(q_1 - z_1, w_1) * s_x1 * s_w1 + b"""
    layer, quant, x = build(
        SPLIT[0], QuantSpec(bits=8, per=per), QuantSpec(bits=8), splits=SPLIT[1]
    )
    fit(quant, x).harden()
    rows = 5 if per == "channel" else 1
    out, start = 0, 0
    for part, width in enumerate(SPLIT[1]):
        x_part, w_part = (
            x[:, start : start + width],
            layer.weight.detach()[:, start : start + width],
        )
        q, w = quant.input_quantizer, quant.weight_quantizer
        low, high = min(x_part.min(), torch.tensor(0.0)), x_part.max()
        # each half has a range of its own
        assert torch.equal(q.scale[0, part], (high - low) / 255)
        s_w, z_w = (
            v[0, part * rows : (part + 1) * rows].reshape(-1, 1, 1, 1)
            for v in (w.scale, w.zero_point)
        )
        product = integer_layer(
            integers(x_part, q.scale[0, part], q.zero_point[0, part], 8, False),
            integers(w_part, s_w, z_w, 8, False),
            layer,
        ).float()
        term = product * (q.scale[0, part] * s_w.reshape(-1, 1, 1))
        first = term + layer.bias.detach().reshape(-1, 1, 1)
        out, start = first if part == 0 else out + term, start + width
    assert torch.equal(quant(x), out)
    assert_close(quant(x), layer(x).detach(), 0.03)


@pytest.mark.parametrize("exact", [True, False], ids=["powers of two", "any balance"])
@pytest.mark.parametrize("case", ["linear", "conv1d", "conv2d", "conv2d strided"])
def test_balanced_layer_is_integer_arithmetic_with_one_merged_factor(case, exact):
    """conv(clamp(round(x_c / (s_x * b_c)) + z_x) - z_x, w_int) * (s_x * s_w) + b, w_int made of w_c
    * b_c. By powers of two the layer, which multiplies with 1/b_c first, gives these bits; by
    others it may fall otherwise at a tie."""
    layer, quant, x = build(
        case, QuantSpec(bits=8, per="channel"), QuantSpec(bits=8), balanced=True
    )
    b = 2.0 ** torch.arange(-2, 4) if exact else normal(6, seed=3).exp()
    quant.balance(b)
    fit(quant, x).harden()
    column, rows = [-1, *[1] * quant.trailing], [-1, *[1] * (quant.trailing + 1)]
    s_x, z_x = quant.input_quantizer.scale[0, 0], quant.input_quantizer.zero_point[0, 0].long()
    s_w, z_w = quant.weight_quantizer.scale[0], quant.weight_quantizer.zero_point[0]
    assert 0 < z_x < 255
    merged = x * (1 / (s_x * b)).reshape(column)
    codes = (merged.round().long() + z_x).clamp(0, 255) - z_x
    if not exact:
        own = integers(x * (1 / b).reshape(column), s_x, z_x, 8, False)
        tie = (merged.double() - merged.double().floor() - 0.5).abs() < 1e-4
        assert (own - codes).abs().max() <= 1 and bool(tie[own != codes].all())
        codes = own
    weight = integers(
        layer.weight.detach() * b.reshape(column), s_w.reshape(rows), z_w.reshape(rows), 8, False
    )
    expected = integer_layer(codes, weight, layer).float() * (s_x * s_w.reshape(column))
    assert torch.equal(quant(x), expected + layer.bias.detach().reshape(column))
    assert_close(quant(x), layer(x).detach(), 0.2)


def test_own_weights_for_every_segment_are_integer_arithmetic_bit_for_bit():
    """conv(q_x - z_x, w_int[s]) * (s_x[s] * s_w[s]) + b"""
    timeline = Timeline([300, 600])
    layer, quant, x = build(
        "conv2d",
        QuantSpec(bits=4, per="channel", per_segment=True),
        QuantSpec(bits=8),
        timeline=timeline,
    )
    rng = torch.Generator().manual_seed(0)
    codes, zeros = (
        torch.randint(16, shape, generator=rng) for shape in ((3, *layer.weight.shape), (3, 5))
    )
    q, w = quant.input_quantizer, quant.weight_quantizer
    w.scale.data, w.zero_point = torch.rand(3, 5, generator=rng) + 0.1, zeros.float()
    quant.set_unsigned_codes(codes)
    q.scale.data, q.zero_point = (
        torch.tensor([[0.01], [0.02], [0.03]]),
        torch.tensor([[100.0], [128.0], [0.0]]),
    )
    for s, t in enumerate((0.0, 500.0, 900.0)):
        timeline.set_time(torch.tensor([t]))
        product = integer_layer(
            integers(x, q.scale[s, 0], q.zero_point[s, 0], 8, False),
            codes[s] - zeros[s].reshape(-1, 1, 1, 1),
            layer,
        ).float()
        factor = (q.scale[s, 0] * w.scale[s]).reshape(-1, 1, 1)
        expected = product * factor + layer.bias.detach().reshape(-1, 1, 1)
        assert torch.equal(quant(x), expected)


@pytest.mark.parametrize(
    "inputs", [dict(per="channel"), dict(per="group", group_size=2)], ids=["channel", "group"]
)
def test_scales_that_vary_inside_the_sum_multiply_the_codes(inputs):
    """conv((q_x - z_x) * s_x, w_int) * s_w + b"""
    layer, quant, x = build("conv2d", QuantSpec(bits=4, per="channel"), QuantSpec(bits=4, **inputs))
    fit(quant, x).harden()
    q, of = quant.input_quantizer, quant.input_quantizer.group_of
    codes = integers(x, q.scale[0][of], q.zero_point[0][of], 4, False)
    scaled = codes.float() * q.scale[0][of]
    expected = F.conv2d(scaled, quant.weight_int, padding=1) * quant.weight_quantizer.scale[
        0
    ].reshape(-1, 1, 1)
    assert torch.equal(quant(x), expected + layer.bias.detach().reshape(-1, 1, 1))
    exact = F.conv2d(codes.double() * q.scale[0][of].double(), quant.weight_int.double(), padding=1)
    assert_close(
        expected, (exact * quant.weight_quantizer.scale[0].reshape(-1, 1, 1)).float(), 1e-6
    )


@pytest.mark.parametrize("case, splits", [("linear", None), ("conv2d strided", None), SPLIT])
def test_hardening_keeps_the_output_of_nearest_rounding(case, splits):
    layer, quant, x = build(
        case, QuantSpec(bits=4, per="channel"), QuantSpec(bits=6), splits=splits
    )
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
    _, quant, x = build(
        case, QuantSpec(bits=8, per="channel"), QuantSpec(bits=8), splits=splits, timeline=timeline
    )
    timeline.set_time(steps)
    x = x * (1 + steps).reshape(-1, *[1] * (x.dim() - 1))
    fit(quant, x).harden()
    assert len(quant.input_quantizer.scale.unique(dim=0)) == 3
    together = quant(x)
    for i, t in enumerate(steps):
        timeline.set_time(t[None])
        assert torch.equal(together[i : i + 1], quant(x[i : i + 1]))


def test_padding_is_an_exact_zero():
    layer, quant, _ = build("conv2d", QuantSpec(bits=8), QuantSpec(bits=8))
    x = normal(2, 6, 7, 8).abs() + 3  # nowhere near zero
    fit(quant, x).harden()
    inner = (
        F.conv2d(
            F.pad(quant.input_quantizer(x), (1, 1, 1, 1)),
            quant.weight_int * quant.weight_quantizer.scale[0, 0],
        )
        + layer.bias.detach()[:, None, None]
    )
    assert_close(quant(x), inner, 1e-5)


def test_padding_right_and_below_is_an_exact_zero_in_integers():
    torch.manual_seed(0)
    down, x = Downsample(6, True), normal(2, 6, 8, 6).abs() + 3  # nowhere near zero
    layer = down.conv
    down.conv = quant = QuantLayer(
        layer, QuantSpec(bits=8, per="channel"), QuantSpec(bits=8), Timeline(), False
    )
    fit(quant, F.pad(x, (0, 1, 0, 1))).harden()
    q, w = quant.input_quantizer, quant.weight_quantizer
    codes = integers(x, q.scale[0, 0], q.zero_point[0, 0], 8, False)
    padded = torch.zeros(2, 6, 9, 7, dtype=torch.long)
    padded[:, :, :8, :6] = codes
    z_w = w.zero_point[0].reshape(-1, 1, 1, 1)
    weight = integers(layer.weight.detach(), w.scale[0].reshape(-1, 1, 1, 1), z_w, 8, False)
    factor = (q.scale[0, 0] * w.scale[0]).reshape(-1, 1, 1)
    expected = integer_layer(padded, weight, layer).float() * factor
    assert codes.min() > 100 and expected.shape == (2, 6, 4, 3)
    assert torch.equal(down(x), expected + layer.bias.detach().reshape(-1, 1, 1))


def test_unsigned_codes_with_corrections_for_both_zero_points():
    """What an engine runs: sum (q_x - z_x)(q_w - z_w) = sum q_x q_w - z_w sum q_x - z_x sum q_w + n
    z_x z_w, x padded with z_x."""
    layer, quant, _ = build("conv2d", QuantSpec(bits=4, per="channel"), QuantSpec(bits=8))
    x = normal(2, 6, 7, 8) + 1
    fit(quant, x).harden()
    q, w = quant.input_quantizer, quant.weight_quantizer
    z_x, z_w = q.zero_point.long().item(), w.zero_point[0].long().reshape(-1, 1, 1)
    q_x = F.pad(q.codes(x).detach().long() + z_x, (1, 1, 1, 1), value=z_x)
    q_w, bare = quant.unsigned_codes().long(), nn.Conv2d(6, 5, 3)
    ones = torch.ones(1, 6, 3, 3, dtype=torch.long)
    total = (
        integer_layer(q_x, q_w, bare)
        - z_w * integer_layer(q_x, ones, bare)
        - z_x * q_w.sum((1, 2, 3)).reshape(-1, 1, 1)
        + 6 * 9 * z_x * z_w
    )
    assert z_x > 0 and q_x.min() >= 0 and q_w.min() >= 0 and q_w.max() == 15
    factor = (q.scale[0, 0] * w.scale[0]).reshape(-1, 1, 1)
    expected = total.float() * factor + layer.bias.detach().reshape(-1, 1, 1)
    assert torch.equal(quant(x), expected)


def test_sums_beyond_the_integers_of_float32_are_right_to_its_rounding():
    layer, x = tag("q", nn.Conv2d(512, 8, 3, padding=1, bias=False)), 2 + normal(1, 512, 4, 4).abs()
    layer.weight.data = 2 + normal(8, 512, 3, 3, seed=1).abs()
    quant = QuantLayer(
        layer, QuantSpec(bits=8, per="channel"), QuantSpec(bits=8), Timeline(), False
    )
    fit(quant.requires_grad_(False), x).harden()
    total = integer_layer(quant.input_quantizer.codes(x).long(), quant.weight_int.long(), layer)
    assert total.max() > 2**24
    expected = (
        total.double()
        * quant.input_quantizer.scale[0, 0]
        * quant.weight_quantizer.scale[0].reshape(-1, 1, 1)
    )
    torch.testing.assert_close(quant(x).double(), expected, rtol=2e-6, atol=0)


def test_what_cannot_be_quantized_is_refused():
    with pytest.raises(ValueError, match="grouped convolutions"):
        QuantLayer(
            tag("q", nn.Conv2d(4, 4, 3, groups=2)),
            QuantSpec(bits=8),
            QuantSpec(),
            Timeline(),
            False,
        )
    with pytest.raises(ValueError, match="per tensor or per head, not 'per: channel'"):
        QuantMatmul(Matmul("q", "k"), [QuantSpec(bits=8, per="channel"), QuantSpec()], Timeline())

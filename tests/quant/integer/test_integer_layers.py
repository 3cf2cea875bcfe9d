"""Layers and products on integers against their quantized forms, bit for bit."""

import pytest
import torch
from integer_layers import LAYERS, SPLIT, build
from tiny import fit, normal

from base.network import Doubling, NormAct, PadEnd
from quant.integer import glue
from quant.integer.cpu import cpu_engine
from quant.integer.grids import Grid
from quant.integer.layers import IntegerLayer, IntegerNorm, IntegerRearrangement, why_not_integer
from quant.spec import QuantSpec

PER_CHANNEL, INPUT = QuantSpec(bits=4, per="channel"), QuantSpec(bits=8)


def make(case, weight=PER_CHANNEL, inputs=INPUT, **more):
    """A fitted, hardened layer and what it was fitted to."""
    layer, quant, _ = build(case, weight, inputs, **more)
    x = normal(*LAYERS[case][1])
    if more.get("balanced"):
        quant.balance(torch.rand(6) + 0.5)
    fit(quant, x).harden()
    return quant, x


@pytest.mark.parametrize("bits", [2, 4, 7, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("case", LAYERS)
def test_layer_gives_the_bits_of_its_definition(case, symmetric, bits):
    quant, x = make(
        case,
        QuantSpec(bits=bits, per="channel", symmetric=symmetric),
        QuantSpec(bits=8, symmetric=symmetric),
    )
    engine = cpu_engine()
    reason = why_not_integer(quant, engine.largest)
    if reason:  # without VNNI wide weights stay as defined
        assert bits > 6 and engine.largest < 128 and "overflow" in reason
    else:
        assert torch.equal(IntegerLayer(quant, engine, glue)(x), quant(x))


@pytest.mark.parametrize("balanced", [False, True])
def test_split_inputs_are_two_products(balanced):
    quant, x = make(SPLIT[0], splits=SPLIT[1], balanced=balanced)
    integer = IntegerLayer(quant, cpu_engine(), glue)
    assert len(integer.grids) == 2 and torch.equal(integer(x), quant(x))


@pytest.mark.parametrize("case", ["linear over tokens", "conv1d", "conv2d"])
def test_codes_are_read_as_they_are(case):
    quant, x = make(case, balanced=True)
    integer = IntegerLayer(quant, cpu_engine(), glue)
    row = integer.grids[0].row
    q = quant.input_quantizer
    codes = (q.codes(quant.balanced_input(x)) + q.zero_point[0, 0]).to(torch.uint8)
    axes = row.balance.dim() - 1
    own = glue.quantize(x.unsqueeze(2) if case == "conv1d" else x, row)
    assert torch.equal(own.reshape(x.shape), codes) and axes == (0 if "linear" in case else 2)
    assert torch.equal(integer(codes), quant(x))


def test_why_a_layer_stays_as_defined():
    quant, _ = make("conv2d")
    assert why_not_integer(quant, 128) == ""
    wide, _ = make("conv2d", QuantSpec(bits=8, per="channel"))
    assert why_not_integer(wide, 128) == ""
    assert "8 bits overflow on this processor" in why_not_integer(wide, 64)
    for inputs, reason in (
        (QuantSpec(), "its input is not quantized"),
        (QuantSpec(bits=8, per="channel"), "its input has a scale for every channel"),
        (QuantSpec(bits=16), "its input has 16 bits"),
    ):
        assert why_not_integer(make("conv2d", inputs=inputs)[0], 128) == reason
    assert why_not_integer(make("conv2d", QuantSpec())[0], 128) == "its weight is not quantized"


def test_norm_hands_on_codes_and_rearrangements_move_them():
    x = normal(2, 6, 4, 5)
    norm = NormAct(6, num_groups=3, eps=1e-5).requires_grad_(False)
    quant, _ = make("conv2d")
    grid = Grid(quant.input_quantizer)
    codes = glue.quantize(norm(x), grid.row)
    assert torch.equal(IntegerNorm(norm, grid, glue)(x), codes) and codes.dtype is torch.uint8
    assert torch.equal(IntegerNorm(norm, None, glue)(x), norm(x))
    for inner in (Doubling(), PadEnd()):
        module = IntegerRearrangement(inner, grid, glue)
        assert torch.equal(module(codes), module(norm(x)))
        assert torch.equal(module(codes), glue.quantize(inner(norm(x)), grid.row))

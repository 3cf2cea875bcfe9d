"""Attention products and maps on integers against their quantized forms, bit for bit."""

import pytest
import torch
from tiny import fit, normal

from base.network import Matmul, Softmax
from quant.integer import attention, glue
from quant.integer.attention import IntegerMatmul, IntegerSoftmax
from quant.integer.cpu import cpu_engine
from quant.integer.grids import Grid
from quant.layers import QuantMatmul
from quant.spec import QuantSpec
from quant.timeline import Timeline


def product(roles, a, b, bits=8):
    """A fitted one; the second operand of a pair with the attention map has `bits`."""
    specs = [QuantSpec(bits=bits if role == "probs" else 8) for role in roles]
    return fit(QuantMatmul(Matmul(*roles), specs, Timeline()), a, b)


@pytest.mark.parametrize("bits", [8, 16])
def test_product_of_activations_gives_the_bits_of_its_definition(bits):
    a, b = normal(2, 3, 4, 5), normal(2, 3, 5, 6, seed=1).softmax(-1)
    quant = product(("v", "probs"), a, b, bits)
    assert torch.equal(IntegerMatmul(quant, cpu_engine(), glue)(a, b), quant(a, b))


@pytest.mark.parametrize("offset", [0.0, 5.0, -5.0], ids=["centred", "positive", "negative"])
@pytest.mark.parametrize("roles", [("v", "probs"), ("probs", "v")], ids="-".join)
def test_maps_and_values_are_multiplied_on_int8_where_maps_are_large(roles, offset, monkeypatch):
    """The zero point of the values lies in the middle or at either end of 0..255."""
    values, maps = normal(2, 3, 5, 70) + offset, normal(2, 3, 64, 70, seed=1).softmax(-1)
    a, b = (values, maps.mT) if roles[0] == "v" else (maps, values.mT)
    quant = product(roles, a, b)
    integer = IntegerMatmul(quant, cpu_engine(), glue)
    codes = glue.quantize(maps, integer.grids[roles.index("probs")].row)
    given = (values, codes.mT) if roles[0] == "v" else (codes, values.mT)
    expected, calls = quant(a, b), []

    def noted(*operands):
        calls.append(operands)
        return IntegerMatmul._on_int8(integer, *operands)

    monkeypatch.setattr(integer, "_on_int8", noted)
    monkeypatch.setattr(attention, "LARGE", 1)
    count = 1 if cpu_engine().largest == 128 else 0  # without VNNI sums overflow
    assert torch.equal(integer(*given), expected) and len(calls) == count
    monkeypatch.setattr(attention, "LARGE", 2**30)
    assert torch.equal(integer(*given), expected) and len(calls) == count


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_softmax_takes_the_scale_of_its_scores_and_hands_on_codes(factor):
    q, k, v = normal(2, 6, 8), normal(2, 8, 6, seed=1), normal(2, 4, 6, seed=2)
    scores = product(("q", "k"), q, k)
    maps = Softmax()(scores(q, k), factor)
    values = product(("v", "probs"), v, maps.mT)
    integer = IntegerMatmul(scores, cpu_engine(), glue)
    integer.scaled = False
    grid = Grid(values.b_quantizer)
    codes = IntegerSoftmax(grid, integer, glue)(integer(q, k), factor)
    assert torch.equal(codes, glue.quantize(maps, grid.row)) and codes.dtype is torch.uint8
    alone = IntegerSoftmax(grid, None, glue)(scores(q, k), factor)
    assert torch.equal(alone, codes)

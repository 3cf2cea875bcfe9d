"""Products made of others: shifted weights, zero points taken off behind the product."""

import pytest
import torch
from integer_layers import build
from tiny import fit, normal

from quant.integer import glue, products
from quant.integer.cpu import cpu_engine
from quant.integer.products import Compensated, product_of, shifts_of
from quant.spec import QuantSpec

CASES = ["conv1d", "conv2d", "conv2d 1x1", "conv2d strided"]


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
@pytest.mark.parametrize("case", CASES)
def test_zero_points_are_taken_off_behind_the_product(case, zero_point, monkeypatch):
    """In padded maps too; both ways give sum (q - z) w * scale + b."""
    layer, quant, _ = build(case, QuantSpec(bits=4, per="channel"), QuantSpec(bits=8))
    x = normal(4, 6, 11) if case == "conv1d" else normal(4, 6, 7, 8)
    fit(quant, x).harden()
    product = product_of(quant.weight_int, quant, cpu_engine(), glue)
    assert isinstance(product, Compensated)
    codes = torch.randint(0, 256, x.shape, generator=torch.Generator().manual_seed(1))
    scale, bias = torch.rand(2, 5)
    sums = quant.operation((codes - zero_point).double(), quant.weight_int.double(), None).float()
    column = (-1, *[1] * quant.trailing)
    expected = sums * scale.reshape(column) + bias.reshape(column)
    given = codes.to(torch.uint8), zero_point, scale, bias
    given = (given[0].unsqueeze(2) if case == "conv1d" else given[0], *given[1:])
    for calls in (2**16, -(2**16)):
        monkeypatch.setattr(products, "CALLS", calls)
        found = product(*given)
        assert torch.equal(found.squeeze(2) if case == "conv1d" else found, expected)


def test_sums_that_float32_does_not_hold_are_left_to_the_engine():
    quant = build("conv2d", QuantSpec(bits=8, per="channel"), QuantSpec(bits=8))[1]
    weight = torch.full((5, 600, 3, 3), 100.0)
    weight[0] = -13.0
    product = product_of(weight, quant, cpu_engine(), glue)
    assert 255 * 100 * 5400 > 2**24 and not isinstance(product, Compensated)
    assert isinstance(product_of(weight / 100, quant, cpu_engine(), glue), Compensated)


def test_shifts_bring_integers_of_9_bits_into_8():
    weight = torch.tensor([[-255.0, 0], [0, 255], [-128, 127], [-200, 55], [3, 4]])
    shifts = shifts_of(weight)
    assert shifts.tolist() == [-127, 128, 0, -72, 0]
    rest = weight - shifts[:, None]
    assert rest.min() == -128 and rest.max() == 127

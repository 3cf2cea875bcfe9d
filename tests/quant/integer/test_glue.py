"""The glue between integer products, in plain PyTorch."""

import math

import pytest
import torch

from base.network import NormAct
from quant.grid import centered_codes
from quant.integer import glue
from quant.integer.glue import Row

ROW = Row(2.0, -3.0, 4.0, 3)


def test_codes_are_rounded_to_even_and_clamped():
    x = torch.tensor([0.25, 0.75, -0.25, -0.75, 1.0, 10.0, -10.0])
    assert glue.integers(x, ROW).tolist() == [0, 2, 0, -2, 2, 4, -3]
    codes = glue.quantize(x, ROW)
    assert codes.dtype is torch.uint8 and codes.tolist() == [3, 5, 3, 1, 5, 7, 0]
    assert x[0] == 0.25  # what was given stays


def test_integers_are_those_of_the_library():
    x, scale, zero = torch.randn(1000), torch.tensor(0.013), torch.tensor(90.0)
    row = Row(float(scale.reciprocal()), -90.0, 165.0, 90)
    assert torch.equal(glue.integers(x, row), centered_codes(x, scale, zero, 0, 255))


def test_channels_are_balanced_first():
    row = ROW._replace(balance=torch.tensor([1.0, 0.5]).reshape(2, 1, 1))
    assert glue.integers(torch.ones(1, 2, 1, 1), row).flatten().tolist() == [2, 1]


@pytest.mark.parametrize("silu", (False, True))
@pytest.mark.parametrize("with_added", (False, True))
@pytest.mark.parametrize("with_film", (False, True))
def test_norms_give_what_the_module_gives(silu, with_added, with_film):
    norm, x = NormAct(8, num_groups=2, eps=1e-5, silu=silu), torch.randn(2, 8, 3, 3)
    added = torch.randn(2, 8) if with_added else None
    film = torch.randn(2, 16).chunk(2, 1) if with_film else None
    with torch.no_grad():
        kept, expected = x.clone(), norm(x, added, film)
        assert torch.equal(glue.norm_act(x, norm, added, film), expected)
        codes = glue.norm_act_quantize(x, norm, ROW, added, film)
    assert torch.equal(codes, glue.quantize(expected, ROW))
    assert torch.equal(x, kept)


def test_sums_are_shifted_and_scaled_in_place():
    acc = torch.tensor([10.0, 20.0]).reshape(1, 2, 1, 1)
    shifts, scale = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0])
    out = glue.rescale(acc, torch.full((1, 1, 1, 1), 4.0), shifts, scale, torch.tensor([1.0, 0.0]))
    assert out is acc and out.flatten().tolist() == [8, 32]
    rows = glue.rescale(torch.tensor([[10.0, 20.0]]), torch.tensor([[4.0]]), shifts, scale, None)
    assert rows.tolist() == [[7, 32]]


def test_softmax_outputs_are_scaled_first_and_rounded():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, -torch.inf, -torch.inf]])
    kept, row = scores.clone(), Row(10.0, -1.0, 4.0, 1)
    assert glue.softmax_integers(scores, 0.5, row).tolist() == [[2, 2, 2, 2], [4, 4, 0, 0]]
    codes = glue.softmax_quantize(scores, 1.0, row)
    assert codes.dtype is torch.uint8 and codes.tolist() == [[3, 3, 3, 3], [5, 5, 1, 1]]
    apart = torch.tensor([0.0, math.log(3) / 2])  # 1 to 3 when doubled
    assert glue.softmax_integers(apart, 2.0, Row(8.0, 0.0, 255.0, 0)).tolist() == [2, 6]
    assert torch.equal(scores, kept)

"""Products of the CPU engine against sums in int64, and what its self-test sees."""

import pytest
import torch
import torch.nn.functional as F

from quant.integer import cpu
from quant.integer.cpu import SAFE, OnednnEngine, cpu_engine, is_exact


def draw(low, high, *shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


CASES = [
    ((1, 1), (1, 1), (1, 1), (3, 3)),
    ((2, 2), (0, 0), (1, 1), (3, 3)),
    ((1, 2), (2, 1), (2, 1), (3, 2)),
    ((1, 1), (0, 0), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("zero_point", [0, 7, 128, 255])
def test_convolution_is_exact_with_zero_points_and_padding(case, zero_point):
    stride, padding, dilation, kernel = case
    weight, codes = draw(-8, 8, 5, 6, *kernel), draw(0, 256, 2, 6, 7, 8, seed=1)
    scale, bias = torch.rand(5) + 0.01, torch.randn(5)
    product = cpu_engine().conv(weight.to(torch.int8), stride, padding, dilation)
    found = product(codes.to(torch.uint8), zero_point, scale, bias)
    sums = F.conv2d(
        (codes - zero_point).double(), weight.double(), None, stride, padding, dilation
    ).float()
    assert torch.equal(found, sums * scale[:, None, None] + bias[:, None, None])
    assert found.is_contiguous(memory_format=torch.channels_last)
    bare = product(codes.to(torch.uint8), zero_point, scale, None)
    assert torch.equal(bare, sums * scale[:, None, None])


def test_linear_product_is_exact_over_any_axes_in_front():
    weight, codes = draw(-8, 8, 5, 6), draw(0, 256, 2, 3, 6, seed=1)
    scale, bias = torch.rand(5) + 0.01, torch.randn(5)
    found = cpu_engine().linear(weight.to(torch.int8))(codes.to(torch.uint8), 9, scale, bias)
    sums = ((codes - 9) @ weight.T).float()
    assert torch.equal(found, sums * scale + bias)


def test_an_engine_whose_sums_overflow_is_not_exact(monkeypatch):
    """As oneDNN without VNNI: pairs of products are added in 16 bits, which saturate."""

    class Saturating(OnednnEngine):
        def conv(self, weight, stride, padding, dilation):
            inner = super().conv(weight, stride, padding, dilation)
            over = 1.0 * (2 * 255 * int(weight.int().abs().max()) > 32767)
            return lambda *given: inner(*given) - over

    assert is_exact(OnednnEngine(SAFE)) and is_exact(Saturating(SAFE))
    assert not is_exact(Saturating(128))
    monkeypatch.setattr(cpu, "OnednnEngine", Saturating)
    assert cpu_engine() == Saturating(SAFE)


def test_why_there_is_no_engine_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cpu, "is_exact", lambda engine: False)
    assert "differ from their definition" in cpu_engine()
    monkeypatch.setattr(cpu, "OPERATORS", ("qconv_of_another_version",))
    assert "has no operator onednn.qconv_of_another_version" in cpu_engine()

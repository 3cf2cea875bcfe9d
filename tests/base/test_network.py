"""How networks describe themselves: roles are checked, embeddings give the recorded numbers."""

import pytest
import torch
import torch.nn.functional as F
from conftest import read_fixture
from torch import nn

from base.network import ROLES, Doubling, Matmul, NormAct, PadEnd, tag, timestep_embedding


@pytest.mark.parametrize("order", ["sin_first", "cos_first"])
@pytest.mark.parametrize("width", [32, 33, 128])
def test_timestep_embedding(order, width):
    """Within what the last digit of a frequency can do. The recorded frequencies come from another
    exp than this processor's: vector libraries choose one by the processor, and they differ by a
    unit in the last place, 2^-23 of the value. An angle, their product with t, is off by as much
    and rounded by as much at most; so is its sine, which itself is rounded to 2^-23."""
    _, _, tensors = read_fixture("primitives")
    t = tensors[f"embed_{order}/in/t"]
    expected = tensors[f"embed_{order}/out/dim{width}"]
    found = timestep_embedding(t, width, cos_first=order == "cos_first")
    half = width // 2
    exponent = torch.arange(half).double() / (half if order == "cos_first" else half - 1)
    angle = t.double()[:, None] * 10000.0**-exponent
    allowed = torch.cat([angle, angle, torch.zeros(len(t), width % 2)], dim=1) * 2**-22 + 2**-23
    assert found.shape == (len(t), width)
    assert ((found - expected).double().abs() <= allowed).all()


def test_a_tagged_layer_keeps_its_role_and_attributes():
    layer = nn.Linear(4, 2)
    assert tag("skip", layer, input_splits=(1, 3)) is layer
    assert (layer.role, layer.input_splits) == ("skip", (1, 3))
    assert Matmul("v", "probs", num_heads=2).roles == ("v", "probs")


@pytest.mark.parametrize("make", [lambda role: tag(role, nn.Identity()), lambda r: Matmul("q", r)])
def test_a_misspelt_role_is_refused(make):
    with pytest.raises(ValueError) as error:
        make("emb_porj")
    assert str(error.value) == "role 'emb_porj' is unknown; did you mean 'emb_proj'?"
    for role in ROLES:
        make(role)


@pytest.mark.parametrize("silu", [True, False])
def test_a_norm_includes_what_stands_around_it(silu):
    """silu(norm(x + a) (1 + scale) + shift), the norm over all pixels of a group of channels."""
    torch.manual_seed(0)
    norm = NormAct(6, num_groups=3, eps=1e-5, silu=silu).requires_grad_(False)
    norm.weight.copy_(torch.rand(6))
    norm.bias.copy_(torch.rand(6))
    x, added, scale, shift = torch.randn(2, 6, 4, 5), *torch.randn(3, 2, 6)
    h = (x + added[:, :, None, None]).reshape(2, 3, -1)
    h = (h - h.mean(2, keepdim=True)) / (h.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
    h = h.reshape(x.shape) * norm.weight[:, None, None] + norm.bias[:, None, None]
    h = h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]
    found = norm(x, added, (scale, shift))
    torch.testing.assert_close(found, F.silu(h) if silu else h)


def test_a_norm_keeps_half_precision_around_float_parameters():
    x = torch.randn(2, 6, 4, 5).half()
    assert NormAct(6, num_groups=3, eps=1e-5)(x).dtype == torch.float16


def test_rearrangements_move_values_of_any_type():
    x = torch.arange(6, dtype=torch.uint8).reshape(1, 1, 2, 3)
    doubled = [[0, 0, 1, 1, 2, 2], [0, 0, 1, 1, 2, 2], [3, 3, 4, 4, 5, 5], [3, 3, 4, 4, 5, 5]]
    assert Doubling()(x)[0, 0].tolist() == doubled
    assert PadEnd()(x, 7)[0, 0].tolist() == [[0, 1, 2, 7], [3, 4, 5, 7], [7, 7, 7, 7]]

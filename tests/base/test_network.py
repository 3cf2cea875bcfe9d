"""How networks describe themselves: roles are checked, embeddings give the recorded numbers."""

import pytest
import torch
from conftest import read_fixture
from torch import nn

from base.network import ROLES, Matmul, tag, timestep_embedding


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

"""Networks of latent diffusion are asked by a context, by classes or by both."""

import pytest
import torch
from ldm_nets import CONTEXT, LABELS, OPTIONS, condition, inputs, tiny


@pytest.mark.parametrize(
    "kind, wrong, expected",
    [
        ("transformer", None, "a context of shape (2, length, 24); given: NoneType"),
        (
            "transformer",
            LABELS,
            "a context of shape (2, length, 24); given: torch.int64 of shape (2,)",
        ),
        (
            "transformer",
            CONTEXT[..., :5],
            "a context of shape (2, length, 24); given: torch.float32 of shape (2, 7, 5)",
        ),
        (
            "transformer",
            CONTEXT[:1],
            "a context of shape (2, length, 24); given: torch.float32 of shape (1, 7, 24)",
        ),
        ("classes", None, "class labels of shape (2,), torch.int64; given: NoneType"),
        (
            "classes",
            LABELS.float(),
            "class labels of shape (2,), torch.int64; given: torch.float32 of shape (2,)",
        ),
        (
            "classes",
            CONTEXT,
            "class labels of shape (2,), torch.int64; given: torch.float32 of shape (2, 7, 24)",
        ),
        (
            "transformer and classes",
            CONTEXT,
            "(2, length, 24) and class labels of shape (2,), torch.int64; given: torch",
        ),
        (
            "transformer and classes",
            (LABELS, CONTEXT),
            "and class labels of shape (2,), torch.int64; given: tuple",
        ),
        ("conv", LABELS, "the condition of this network is None; given: torch.int64 of shape (2,)"),
    ],
)
def test_a_wrong_condition_is_refused_in_one_sentence(kind, wrong, expected):
    net = tiny(**OPTIONS.get(kind, {}))
    with pytest.raises(ValueError) as error:
        net(*inputs(), wrong)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["transformer", "classes", "transformer and classes"])
def test_the_condition_shows_in_the_output(kind):
    net, (x, t), cond = tiny(**OPTIONS[kind]), inputs(), condition(OPTIONS[kind])
    other = tuple(c.flip(-1) for c in cond) if isinstance(cond, tuple) else cond.flip(-1)
    with torch.no_grad():
        assert not torch.allclose(net(x, t, cond), net(x, t, other), atol=1e-3)

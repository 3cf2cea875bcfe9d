"""Every group map equals a loop over channels."""

import pytest
import torch

from quant.groups import activation_groups, num_groups, split_of, weight_groups

ACTIVATIONS = {
    "tensor": (dict(per="tensor"), lambda c: 0),
    "channel": (dict(per="channel"), lambda c: c),
    "head": (dict(per="head"), lambda c: c),
    "group of 2": (dict(per="group", group_size=2), lambda c: c // 2),
    "group of 4, last one short": (dict(per="group", group_size=4), lambda c: 0 if c < 4 else 1),
    "split 2+4": (dict(per="tensor", splits=(2, 4)), lambda c: 0 if c < 2 else 1),
    "split 1+2+3": (
        dict(per="tensor", splits=(1, 2, 3)),
        lambda c: 0 if c < 1 else 1 if c < 3 else 2,
    ),
}


@pytest.mark.parametrize("trailing", [0, 1, 2])
@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activation_map_equals_a_loop(case, trailing):
    options, group = ACTIVATIONS[case]
    shape = (6, 3, 2)[: 1 + trailing]
    found = activation_groups(num_channels=6, trailing=trailing, **options)
    expected = torch.zeros(shape, dtype=torch.long)
    for c in range(6):
        expected[c] = group(c)
    assert torch.equal(found.expand(shape), expected)
    assert num_groups(found) == max(map(group, range(6))) + 1


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3), (4, 6, 3, 2)])
@pytest.mark.parametrize(
    "per, splits",
    [
        ("tensor", None),
        ("channel", None),
        ("tensor", (2, 4)),
        ("channel", (2, 4)),
        ("channel", (1, 2, 3)),
    ],
)
def test_weight_map_equals_a_loop(per, splits, shape):
    found, expected = weight_groups(per, shape, splits=splits), torch.zeros(shape, dtype=torch.long)
    ends = [sum(splits[: k + 1]) for k in range(len(splits))] if splits else [shape[1]]
    rows = shape[0] if per == "channel" else 1
    for o in range(shape[0]):
        for i in range(shape[1]):
            part = next(k for k, end in enumerate(ends) if i < end)
            expected[o, i] = part * rows + o % rows
    assert torch.equal(found.expand(shape), expected)
    assert num_groups(found) == len(ends) * rows


def test_split_of():
    assert split_of((1, 3), 4).tolist() == [0, 1, 1, 1]
    assert split_of(None, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "call", [lambda: activation_groups("pixel", 4, 2), lambda: weight_groups("group", (4, 4))]
)
def test_unknown_granularity_is_quoted(call):
    with pytest.raises(ValueError, match="per: (pixel|group)' is unknown"):
        call()


def test_group_needs_its_size():
    with pytest.raises(ValueError, match="needs group_size"):
        activation_groups("group", 4, 2)

"""What can run on int8, by rules and by what rules made of a network."""

import pytest
from torch import nn

from base.network import Matmul
from quant.convert import convert
from quant.integer.support import PRODUCT, why_as_defined, why_by_rules
from quant.network import modules_of

ALL = {"match": "*", "weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}


@pytest.mark.parametrize(
    "part, reason",
    [
        ({}, ""),
        ({"weight": {"bits": 8}, "input": {"bits": 2}}, ""),
        ({"weight": {"bits": 32}, "input": {"bits": 32}}, "not quantized"),
        ({"weight": {"bits": 32}}, "its weight is not quantized"),
        ({"input": {"bits": 32}}, "its input is not quantized"),
        ({"input": {"bits": 16}}, "its input has 16 bits"),
        ({"input": {"segment_bits": [16]}}, "its input has 16 bits"),
        ({"input": {"per": "channel"}}, "its input has a scale for every channel"),
        ({"input": {"per": "group", "group_size": 4}}, "its input has a scale for every group"),
    ],
)
def test_rules_say_what_their_network_says(tiny_net, part, reason):
    rules = [ALL, {"role": "conv1", **part}]
    found, modules = why_by_rules(tiny_net, rules), modules_of(convert(tiny_net, rules))
    roles = {name: getattr(m, "role", "") for name, m in tiny_net.named_modules()}
    kinds = nn.Conv2d, nn.Linear
    assert list(found) == [name for name, m in tiny_net.named_modules() if isinstance(m, kinds)]
    for name, why in found.items():
        assert why == why_as_defined(modules[name]) == (reason * (roles[name] == "conv1"))


def test_products_stay_in_floats(tiny_net):
    rules = [ALL, {"kind": "matmul", "role": "probs", "input": {"bits": 32}}]
    names = [name for name, m in tiny_net.named_modules() if isinstance(m, Matmul)]
    modules = modules_of(convert(tiny_net, rules))
    assert {why_as_defined(modules[name]) for name in names} == {PRODUCT}
    untouched = modules_of(convert(tiny_net, [{"weight": {"bits": 4}}]))
    assert {why_as_defined(untouched[name]) for name in names} == {"not quantized"}
    assert not {*names} & why_by_rules(tiny_net, rules).keys()

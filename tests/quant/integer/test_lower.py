"""Whole networks on integers against their definition, bit for bit."""

import pytest
import torch
from integer_nets import NETWORKS, arguments, hardened

from quant.integer import glue
from quant.integer.cpu import OnednnEngine, cpu_engine
from quant.integer.layers import IntegerNorm, IntegerRearrangement
from quant.integer.lower import lower
from quant.network import Bypass, in_channels_last

ALL = {"match": "*", "weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}
WAYS = {
    "w4a8": [ALL],
    "w4a4": [ALL | {"input": {"bits": 4}}],
    "w8a8": [ALL | {"weight": {"bits": 8, "per": "channel"}}],
    "symmetric": [
        ALL
        | {
            "weight": {"bits": 6, "per": "tensor", "symmetric": True},
            "input": {"bits": 6, "symmetric": True},
        }
    ],
    "balanced": [ALL | {"balance": True}],
    "ends at 8 bits": [ALL, {"role": ["stem", "out"], "weight": {"bits": 8}}],
    "one scale for both parts": [ALL | {"split": False}],
    "weights only": [ALL, {"role": ["conv1", "q", "qkv"], "input": {"bits": 32}}],
    "channels": [ALL, {"role": "conv1", "input": {"bits": 8, "per": "channel"}}],
    "attention": [
        ALL,
        {"kind": "matmul", "role": "probs", "input": {"bits": 16}},
        {"kind": "matmul", "role": ["q", "k"], "input": {"bits": 8, "per": "head"}},
    ],
    "logarithms": [ALL, {"kind": "matmul", "role": "probs", "input": {"grid": "log2"}}],
    "float products": [ALL, {"kind": "matmul", "input": {"bits": 32}}],
}


def engine():
    found = cpu_engine()
    assert isinstance(found, OnednnEngine), found
    return found


@pytest.mark.parametrize("boundaries", [(), (300, 600)], ids=["static", "segments"])
@pytest.mark.parametrize("name", NETWORKS)
def test_network_gives_the_bits_of_its_definition(name, boundaries, tmp_path):
    net = in_channels_last(hardened(name, tmp_path, WAYS["w4a8"], boundaries=boundaries))
    integer = lower(net, arguments(name, 1), engine(), glue)
    assert integer.integer_layers and not [
        w for w in integer.reasons.values() if "product" not in w
    ]
    for t in (0.0, 500.0, 999.0):
        given = arguments(name, t=t)
        assert torch.equal(integer(*given), net(*given))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_quantize_gives_the_same_bits(way, tmp_path):
    net = in_channels_last(hardened("latent", tmp_path, WAYS[way]))
    integer = lower(net, arguments("latent", 1), engine(), glue)
    given = arguments("latent")
    assert torch.equal(integer(*given), net(*given))
    left = {
        name: why
        for name, why in integer.reasons.items()
        if "product" not in why and "overflow" not in why  # without VNNI
    }
    told = {"weights only": "is not quantized", "channels": "has a scale for every channel"}
    assert bool(left) == (way in told)
    assert all(told[way] in why for why in left.values())


def test_own_weights_for_every_segment(tmp_path):
    weight = {"bits": 4, "per": "channel", "per_segment": True}
    passes = [{"segment_models": {"passes": [{"fit_ranges": {}}]}}]
    rules = [ALL | {"weight": weight}]
    net = in_channels_last(hardened("pixel", tmp_path, rules, boundaries=(300, 600), passes=passes))
    integer = lower(net, arguments("pixel", 1), engine(), glue)
    for t in (0.0, 500.0, 999.0):
        assert torch.equal(integer(*arguments("pixel", t=t)), net(*arguments("pixel", t=t)))


def test_samples_of_several_segments_run_apart(tmp_path):
    net = in_channels_last(hardened("pixel", tmp_path, WAYS["w4a8"], boundaries=(300, 600)))
    integer = lower(net, arguments("pixel", 1), engine(), glue)
    x, _ = arguments("pixel", 4)
    t = torch.tensor([999.0, 0.0, 500.0, 0.0])
    found = integer(x, t)
    for row in ([0], [1, 3], [2]):
        assert torch.equal(found[row], net(x[row], t[row]))


def test_codes_travel_where_all_readers_have_one_grid(tmp_path):
    net = hardened("pixel", tmp_path, WAYS["w4a8"])
    kinds = (IntegerNorm, IntegerRearrangement)
    modules = lower(net, arguments("pixel", 1), engine(), glue).net.named_modules()
    found = {name: m.grid for name, m in modules if isinstance(m, kinds)}
    assert {"down.0.downsample.pad", "up.1.upsample.doubling", "norm_out"} < found.keys()
    assert all(found.values())  # min-max ranges of q, k and v are those of what all three read
    net.get_submodule("mid.attn_1.k").input_quantizer.scale.mul_(2)
    norm = lower(net, arguments("pixel", 1), engine(), glue).net.get_submodule("mid.attn_1.norm")
    assert isinstance(norm, IntegerNorm) and norm.grid is None


def test_the_float_weights_go_and_the_simulated_network_stays(tmp_path):
    net = hardened("pixel", tmp_path, WAYS["w4a8"])
    before = net.state_dict().keys(), net(*arguments("pixel"))
    integer = lower(net, arguments("pixel", 1), engine(), glue)
    assert not [name for name in integer.state_dict() if "weight_int" in name]
    assert (net.state_dict().keys(), True) == (
        before[0],
        torch.equal(net(*arguments("pixel")), before[1]),
    )
    assert integer.recipe == net.recipe and integer.timeline is net.timeline


def test_bypass_of_the_input_is_part_of_the_definition(tmp_path):
    net = in_channels_last(hardened("pixel", tmp_path, WAYS["w4a4"]))
    net.bypass = Bypass(net.timeline, 3, 3)
    net.bypass.gain.copy_(torch.rand(1, 3, 3))
    integer = lower(net, arguments("pixel", 1), engine(), glue)
    plain = integer.net(*arguments("pixel"))
    assert torch.equal(integer(*arguments("pixel")), net(*arguments("pixel")))
    assert not torch.equal(integer(*arguments("pixel")), plain)


def test_weights_that_overflow_in_16_bits_stay_as_defined(tmp_path):
    """As on a processor without VNNI, where a sum of two products of 8 bits overflows."""
    net = in_channels_last(hardened("pixel", tmp_path, WAYS["ends at 8 bits"]))
    integer = lower(net, arguments("pixel", 1), OnednnEngine(largest=64), glue)
    left = {name for name, why in integer.reasons.items() if "overflow" in why}
    assert left == {"conv_in", "conv_out"}
    assert torch.equal(integer(*arguments("pixel")), net(*arguments("pixel")))

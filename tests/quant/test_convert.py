"""Rules, replacement by name, the map of what is quantized."""

import copy

import pytest
import torch
from tiny import EXAMPLE, SHAPE, WEIGHT_8, make_job, normal, quantized, rules
from torch import nn

from quant.checkpoint import stored_names
from quant.convert import convert
from quant.graph import trace
from quant.inventory import format_map, quantization_map
from quant.layers import QuantLayer, QuantMatmul
from quant.network import input_quantizers, quant_layers, set_input_quantization
from quant.passes.fit_ranges import fit_ranges
from quant.rules import BITS, check_bits, check_rules, resolve
from quant.timeline import Timeline

T = torch.tensor([3.0, 700.0])


def test_32_bits_everywhere_is_bit_equal(tiny_net):
    net, x = convert(tiny_net, rules(32, 32)), normal(2, *SHAPE)
    assert not quant_layers(net) and not input_quantizers(net)
    assert torch.equal(net(x, T), tiny_net(x, T))


def test_switched_off_quantizers_change_nothing_but_rounding(tiny_net):
    net, x = convert(tiny_net, rules(32, 8) + [{"split": False}]), normal(2, *SHAPE)
    set_input_quantization(net, False)
    # the bias is added separately
    torch.testing.assert_close(net(x, T), tiny_net(x, T), rtol=1e-5, atol=1e-6)


def test_float_network_is_left_as_it_is(tiny_net, tmp_path):
    x, state, names = (
        normal(2, *SHAPE),
        copy.deepcopy(tiny_net.state_dict()),
        [n for n, _ in tiny_net.named_modules()],
    )
    before = tiny_net(x, T)
    net = quantized(tiny_net, tmp_path, rules(4, 4))
    assert not torch.equal(net(x, T), before)
    assert torch.equal(tiny_net(x, T), before) and [n for n, _ in tiny_net.named_modules()] == names
    assert all(torch.equal(value, state[name]) for name, value in tiny_net.state_dict().items())


def test_every_layer_and_product_is_replaced_under_its_own_name(tiny_net):
    net = convert(tiny_net, rules(8, 8))
    for name, module in tiny_net.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            assert (
                isinstance(net.get_submodule(name), QuantLayer)
                and net.get_submodule(name).role == module.role
            )
    for name in ("qk_matmul", "av_matmul"):
        assert isinstance(net.get_submodule(f"mid.attn_1.{name}"), QuantMatmul)


def test_weights_are_shared_until_hardened(tiny_net):
    assert convert(tiny_net, rules(8, 8)).net.conv_in.weight is tiny_net.conv_in.weight


def test_state_has_its_shape_at_birth(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 8), boundaries=[500])
    born = {name: value.shape for name, value in stored_names(job.net).items()}
    fit_ranges(job)
    assert {name: value.shape for name, value in stored_names(job.net).items()} == born
    assert born["conv_in.input_quantizer.scale"] == (2, 1) and born[
        "conv_in.weight_quantizer.scale"
    ] == (1, 8)


def test_later_rules_win_key_by_key():
    wanted = [
        {"weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}},
        {"role": "stem", "weight": {"bits": 8}},
        {"match": "conv_*", "input": {"bits": 6}, "split": False},
    ]
    stem = resolve(wanted, "conv_in", "stem", "layer")
    assert (stem["weight"].bits, stem["weight"].per, stem["input"].bits, stem["split"]) == (
        8,
        "channel",
        6,
        False,
    )
    stem = resolve(wanted[::-1], "conv_in", "stem", "layer")
    assert (stem["weight"].bits, stem["input"].bits) == (4, 8)
    other = resolve(wanted, "mid.block_1.conv1", "conv1", "layer")
    assert (other["weight"].bits, other["input"].bits, other["split"]) == (4, 8, True)


@pytest.mark.parametrize(
    "rule, name, role, kind, applies",
    [
        ({"match": "up.*.nin_shortcut"}, "up.0.block.1.nin_shortcut", "skip", "layer", True),
        ({"match": "up.?.block.*"}, "up.10.block.1.conv1", "conv1", "layer", False),
        ({"match": "up"}, "up.0.block.1.conv1", "conv1", "layer", False),
        ({"role": "probs"}, "mid.attn_1.av_matmul", "probs", "matmul", True),
        ({"role": "probs"}, "mid.attn_1.av_matmul", "v", "matmul", False),
        ({"role": ["k", "v"]}, "mid.attn_1.v", "v", "layer", True),
        ({"role": ["k", "v"]}, "mid.attn_1.q", "q", "layer", False),
        ({"kind": ["layer", "matmul"]}, "mid.attn_1.qk_matmul", "q", "matmul", True),
        ({"kind": "matmul"}, "mid.attn_1.q", "q", "layer", False),
        ({"kind": "layer", "role": "q"}, "mid.attn_1.q", "q", "layer", True),
        ({"kind": "layer", "role": "q"}, "mid.attn_1.qk_matmul", "q", "matmul", False),
        ({"match": "mid.*", "role": "q"}, "up.1.attn.0.q", "q", "layer", False),
    ],
)
def test_what_a_rule_applies_to(rule, name, role, kind, applies):
    assert resolve([rule | {"input": {"bits": 4}}], name, role, kind)["input"].bits == (
        4 if applies else 32
    )


def test_operands_of_a_product_follow_their_roles(tiny_net):
    wanted = [
        {"input": {"bits": 8}},
        {"role": "probs", "input": {"bits": 16}},
        {"match": "mid.*", "kind": "matmul", "role": "k", "input": {"bits": 32}},
    ]
    net = convert(tiny_net, wanted).net
    av, qk = net.up[1].attn[0].av_matmul, net.mid.attn_1.qk_matmul
    assert (av.a_quantizer.spec.bits, av.b_quantizer.spec.bits) == (8, 16)
    assert (
        qk.a_quantizer.spec.bits == 8
        and qk.b_quantizer is None
        and net.mid.attn_1.k.input_quantizer is not None
    )


def test_shortcuts_of_concatenations_are_split_unless_a_rule_says_no(tiny_net):
    split = convert(tiny_net, rules(8, 8)).net.up[0].block[0].nin_shortcut
    assert split.parts == (16, 8) and split.input_quantizer.scale.shape == (1, 2)
    assert split.weight_quantizer.scale.shape == (1, 2 * 8)
    whole = convert(tiny_net, rules(8, 8) + [{"match": "up.0.*", "split": False}]).net
    assert whole.up[0].block[0].nin_shortcut.parts == (24,)
    assert whole.up[0].block[0].nin_shortcut.weight_quantizer.scale.shape == (1, 8)
    assert whole.up[1].block[0].nin_shortcut.parts == (16, 16)


@pytest.mark.parametrize(
    "rule, complaint",
    [
        ({"wieght": {"bits": 8}}, "unknown key 'wieght'; did you mean 'weight'?"),
        ({"weight": {"bit": 8}}, "weight of rule .* unknown key 'bit'; did you mean 'bits'?"),
        ({"input": {"symetric": True}}, "unknown key 'symetric'; did you mean 'symmetric'?"),
        ({"input": {"zzzz": True}}, "unknown key 'zzzz'; known: bits, per"),
        ({"weight": {"bits": 16}}, "weight bits 16 are impossible; choose 2, 3, 4, 5, 6, 7, 8, 32"),
        ({"weight": {"bits": 1}}, "weight bits 1 are impossible"),
        ({"input": {"bits": 9}}, "input bits 9 are impossible; choose 2, 3, 4, 5, 6, 7, 8, 16, 32"),
        ({"input": {"bits": "8"}}, "input bits 8 are impossible"),
    ],
)
def test_wrong_rules_are_explained(rule, complaint, tiny_net):
    with pytest.raises(ValueError, match=complaint):
        check_rules([rule])
    with pytest.raises(ValueError, match=complaint):
        convert(tiny_net, [rule])


def test_possible_bits():
    for bits in BITS:
        check_bits(bits, "weight")
        check_bits(bits, "input")
    check_bits(16, "input")


def test_map_shares(tiny_net):
    macs, total = trace(tiny_net, EXAMPLE).macs, sum(p.numel() for p in tiny_net.parameters())
    weights = sum(
        p.numel() for n, p in tiny_net.named_parameters() if n.endswith("weight") and p.dim() > 1
    )

    def facts(*wanted):
        return quantization_map(tiny_net, convert(tiny_net, list(wanted)), macs)

    everything = facts(*rules(8, 8))
    assert everything["macs_share"] == 1 and everything["params_share"] == weights / total
    assert [row["name"] for row in everything["layers"]] == list(macs)
    products = sum(m for name, m in macs.items() if name.endswith("matmul"))
    assert facts({"weight": WEIGHT_8})["macs_share"] == 1 - products / sum(macs.values())
    stem = facts({"match": "conv_in", "weight": WEIGHT_8})
    assert stem["params_share"] == 216 / total and stem["macs_share"] == macs["conv_in"] / sum(
        macs.values()
    )
    nothing = facts({"weight": {"bits": 32}})
    assert nothing["params_share"] == nothing["macs_share"] == 0


def test_widths_that_differ_by_time_count_by_the_steps_that_have_them(tiny_net):
    """Steps 1 and 2 of three have 4 bits, the third 8: 16/3 bits; q and k together (16 + 16 + 64) /
    3."""
    wanted = rules(4, 8) + [
        {"input": {"segment_bits": [4, 8]}},
        {"role": "probs", "input": {"segment_bits": []}},
    ]
    net = convert(tiny_net, wanted, Timeline([500]))
    facts = quantization_map(tiny_net, net, trace(tiny_net, EXAMPLE).macs, [0.0, 499, 500])
    rows = {row["name"]: row for row in facts["layers"]}
    assert rows["conv_in"]["input_bits"] == pytest.approx(16 / 3)
    assert (
        rows["conv_in"]["bit_product"] == pytest.approx(64 / 3)
        and rows["conv_in"]["weight_bits"] == 4
    )
    assert rows["mid.attn_1.qk_matmul"]["bit_product"] == pytest.approx(32)
    assert rows["mid.attn_1.av_matmul"]["input_bits"] == pytest.approx([16 / 3, 8])
    assert (
        next(line for line in format_map(facts).splitlines() if "av_matmul" in line).split()[3]
        == "5.33/8"
    )


def test_map_as_text(tiny_net):
    net = convert(tiny_net, rules(4, 8) + [{"role": "probs", "input": {"bits": 16}}])
    lines = format_map(quantization_map(tiny_net, net, trace(tiny_net, EXAMPLE).macs)).splitlines()
    assert lines[3].split() == ["conv_in", "stem", "4", "8", "224", "0.01", "int8"]
    assert next(line for line in lines if "mid.attn_1.av_matmul" in line).split()[1:4] == [
        "v+probs",
        "-",
        "8/16",
    ]
    assert "100.00% of the multiply-adds; on int8: " in lines[-1]


def test_map_names_what_runs_on_int8_and_why_the_rest_does_not(tiny_net):
    macs = trace(tiny_net, EXAMPLE).macs
    wanted = [*rules(4, 8), {"role": "stem", "weight": {"bits": 32}, "input": {"bits": 32}}]
    wanted += [{"role": "out", "input": {"per": "channel"}}]
    facts = quantization_map(tiny_net, convert(tiny_net, wanted), macs)
    found = {row["name"]: row["arithmetic"] for row in facts["layers"]}
    others = {name: why for name, why in found.items() if why != "int8"}
    products = {name for name in macs if name.endswith("matmul")}
    assert {others.pop(name) for name in products} == {
        "products of activations run on int8 for large attention maps alone"
    }
    assert others == {
        "conv_in": "not quantized",
        "conv_out": "its input has a scale for every channel",
    }
    left = sum(macs[name] for name in {*others, *products})
    assert facts["int8_share"] == 1 - left / sum(macs.values())
    assert any(line.endswith("every channel") for line in format_map(facts).splitlines())


def test_one_segment_equals_static_and_equal_segments_equal_one(tiny_net, tmp_path):
    x = normal(2, *SHAPE)
    static = quantized(tiny_net, tmp_path, rules(8, 8))
    timed = quantized(tiny_net, tmp_path, rules(8, 8), boundaries=[400])
    for own, other in zip(input_quantizers(timed).values(), input_quantizers(static).values()):
        own.scale.data, own.zero_point = (
            other.scale.data.expand(2, -1),
            other.zero_point.expand(2, -1),
        )
    for t in (T, T[[0, 0]], T[[1, 1]]):
        assert torch.equal(timed(x, t), static(x, t))


def test_more_bits_come_closer(tiny_net, tmp_path):
    x = normal(2, *SHAPE)
    nets = [quantized(tiny_net, tmp_path, rules(bits, bits)) for bits in (4, 6, 8)]
    errors = [(net(x, T) - tiny_net(x, T)).square().mean() for net in nets]
    # each bit halves the step: 16 times for two, roughly
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize(
    "rule, sentence",
    [
        ({"role": "stemm"}, "unknown role 'stemm'; did you mean 'stem'"),
        ({"role": ["out", "stemm"]}, "unknown role 'stemm'; did you mean 'stem'"),
        ({"role": "stem", "weight": 8}, "must be a mapping such as"),
        ("stem", "must be a mapping such as"),
        ({"kind": "matmuls"}, "unknown kind 'matmuls'; did you mean 'matmul'"),
        ({"match": "conv_im"}, "no layer matches 'conv_im'; did you mean 'conv_in'"),
        ({"weight": {"range": "minmix"}}, "'minmix' is unknown; did you mean 'minmax'"),
        ({"weight": {"range": 5}}, "range '5' is unknown; known: minmax"),
        ({"weight": {"per": ["channel"]}}, "per .* is unknown; did you mean 'channel'"),
        ({"match": ["conv_in", "conv_out"]}, "match of rule .* must be one pattern, such as"),
        ({"weight": {"bits": 4.0}}, "weight bits 4.0 are impossible"),
    ],
)
def test_a_rule_that_can_apply_to_nothing_is_refused(tiny_net, rule, sentence):
    with pytest.raises(ValueError, match=sentence):
        convert(tiny_net, [rule])

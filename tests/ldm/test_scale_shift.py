"""The embedding that scales and shifts a norm: an own quantizer for either half, where a rule asks
for it by role."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from tiny import EXAMPLE, SHAPE, fit, normal, quantized, rules

from base.config import load
from base.network import Operand, tag
from ldm.unet import ResBlock
from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized
from quant.convert import convert
from quant.graph import trace
from quant.inventory import format_map, quantization_map
from quant.layers import QuantOperand
from quant.network import input_quantizers, modules_of
from quant.observer import Observer
from quant.passes.step_bits import input_rules
from quant.quantizer import Quantizer
from quant.rules import resolve
from quant.spec import QuantSpec
from quant.timeline import Timeline
from tinydm.recipe import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
METHODS = sorted(path.stem for path in (CONFIGS / "method").glob("*.yaml"))
SPLIT = ("di2n", "i2n", "uniform")  # the methods that ask for it
NETWORK = {
    "family": "improved-unet",
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "channel_mult": [1],
    "attention_resolutions": [1],
    "num_heads": 2,
    "use_scale_shift_norm": True,
}
T = torch.tensor([3.0, 700.0])


@pytest.fixture
def net():
    return randomize(build_network(**NETWORK)).eval().requires_grad_(False)


def method_rules(name):
    files = [
        CONFIGS / "model/cifar10-compact.yaml",
        CONFIGS / "bits/w4a4.yaml",
        CONFIGS / f"method/{name}.yaml",
    ]
    return load(RunConfig, files, ["out=none"]).all_rules


def asked_for(bits, **more):
    return {"role": "scale_shift", "input": {"bits": bits}, **more}


def operands(net):
    return {name: m for name, m in modules_of(net).items() if isinstance(m, QuantOperand)}


def operand(spec, half=4, split=True, timeline=None):
    return QuantOperand(
        tag("scale_shift", Operand(), input_splits=(half, half)),
        spec,
        timeline or Timeline(),
        split,
    )


def test_two_bits_hold_four_values_of_either_half():
    x = torch.tensor([[0.0, 0.25, 0.5, 0.75, 0.0, 64.0, 128.0, 192.0]])
    both = fit(operand(QuantSpec(bits=2)), x)
    assert both.input_quantizer.scale.tolist() == [[0.25, 64.0]] and torch.equal(both(x), x)
    one = fit(operand(QuantSpec(bits=2), split=False), x)
    assert one.input_quantizer.scale.tolist() == [[64.0]]
    assert one(x)[0].tolist() == [0.0, 0.0, 0.0, 0.0, 0.0, 64.0, 128.0, 192.0]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_split_is_two_quantizers_side_by_side(bits, symmetric):
    spec = QuantSpec(bits=bits, symmetric=symmetric, range="mse")
    halves = normal(20, 6) * 0.01, normal(20, 6, seed=1) * 30 + 7
    x, by_hand = torch.cat(halves, dim=1), []
    for half in halves:
        q = Quantizer(spec, torch.tensor(0), Timeline())
        observer = Observer(q, len(half))
        observer.note(half)
        observer.fit()
        by_hand.append(q(half))
    found, whole = (fit(operand(spec, 6, split), x)(x) for split in (True, False))
    assert torch.equal(found, torch.cat(by_hand, dim=1))
    assert (found - x)[:, :6].square().mean() < (whole - x)[:, :6].square().mean() / 10


def test_dequantized_halves_scale_and_shift_the_norm(net):
    block = convert(net, [asked_for(3)]).net.middle_block[0]
    assert isinstance(block, ResBlock) and block.emb_layers[2].input_quantizer.scale.shape == (1, 2)
    x, emb = normal(2, 32, 8, 8), normal(2, 128, seed=1)
    fit(block.emb_layers[2], block.emb_layers[1](block.emb_layers[0](emb)))
    q, raw = block.emb_layers[2].input_quantizer, block.emb_layers[1](block.emb_layers[0](emb))
    values = []
    for half, s, z in zip(raw.chunk(2, dim=1), q.scale[0], q.zero_point[0]):
        code = (half / s).round().add(z).clamp(0, 7)
        values.append(((code - z) * s)[:, :, None, None])
    norm1, _, conv1 = block.in_layers
    norm2, _, _, conv2 = block.out_layers
    normed = F.group_norm(conv1(norm1(x)), 32, norm2.weight, norm2.bias, norm2.eps)
    expected = x + conv2(F.silu(normed * (1 + values[0]) + values[1]))
    torch.testing.assert_close(block(x, emb), expected)


def test_network_keeps_its_state_and_its_output(net):
    layers = {
        f"{part}.{key}"
        for part in ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
        for key in ("weight", "bias")
    }
    assert set(net.middle_block[0].state_dict()) == layers
    x = normal(2, *SHAPE)
    switched_off = convert(net, [asked_for(4)])
    for q in input_quantizers(switched_off).values():
        q.enabled = False
    assert len(input_quantizers(switched_off)) == 5 and torch.equal(switched_off(x, T), net(x, T))


@pytest.mark.parametrize(
    "rule, bits",
    [
        ({}, 32),
        ({"match": "*"}, 32),
        ({"match": "*.emb_layers.2"}, 32),
        ({"kind": "layer"}, 32),
        ({"role": "emb_proj"}, 32),
        ({"role": "scale_shift"}, 4),
        ({"role": ["stem", "scale_shift"]}, 4),
        ({"role": "scale_shift", "match": "*.2"}, 4),
        ({"role": "scale_shift", "match": "*.1"}, 32),
    ],
)
def test_only_a_rule_that_names_the_role_applies(rule, bits):
    found = resolve(
        [rule | {"input": {"bits": 4}}], "middle_block.0.emb_layers.2", "scale_shift", "layer"
    )
    assert found["input"].bits == bits


@pytest.mark.parametrize("method", METHODS)
def test_methods_that_have_it(method, net):
    found = operands(convert(net, method_rules(method)))
    assert len(found) == (5 if method in SPLIT else 0)
    for module in found.values():
        assert module.input_quantizer.spec.bits == 4 and module.input_quantizer.scale.shape == (
            1,
            2,
        )


def without_split(wanted):
    return [rule for rule in wanted if rule.get("role") != "scale_shift"]


@pytest.mark.parametrize("method", SPLIT)
def test_on_other_networks_the_rule_changes_nothing(method, tiny_net, tmp_path):
    wanted, x = method_rules(method), normal(2, *SHAPE)
    plain = build_network(**NETWORK | {"use_scale_shift_norm": False}).requires_grad_(False)
    assert len(without_split(wanted)) == len(wanted) - 1 and not operands(convert(plain, wanted))
    with_it, without = (
        quantized(tiny_net, tmp_path, each) for each in (wanted, without_split(wanted))
    )
    assert with_it.state_dict().keys() == without.state_dict().keys()
    assert torch.equal(with_it(x, T), without(x, T))


def test_uniform_steps_reload_to_the_same_bits(net, tmp_path):
    wanted, x = method_rules("uniform"), normal(2, *SHAPE)
    quant = quantized(net, tmp_path, wanted)
    assert all(m.input_quantizer.is_fitted for m in operands(quant).values())
    save_quantized(
        tmp_path / "q.safetensors",
        quant,
        {"name": "tiny", "network": NETWORK, "rules": wanted, "weights_hash": "0" * 64},
    )
    again = load_quantized(tmp_path / "q.safetensors", build_network)
    assert len(operands(again)) == 5 and torch.equal(again(x, T), quant(x, T))
    other = quantized(net, tmp_path, without_split(wanted))
    assert not torch.equal(other(x, T), quant(x, T))


def test_scales_follow_time_and_reconstruction_learns_and_restores_them(net, tmp_path):
    wanted, x = [*rules(4, 4), asked_for(4)], normal(2, *SHAPE)
    fitted = quantized(net, tmp_path, wanted, boundaries=[500])
    passes = [
        {"fit_ranges": {}},
        {"reconstruct": {"weight_iters": 2, "input_iters": 2, "batch_size": 4}},
    ]
    learned, restored = (
        quantized(net, tmp_path / "run", wanted, passes=passes, boundaries=[500]) for _ in range(2)
    )
    name = "middle_block.0.emb_layers.2.input_quantizer"
    before, after = (each.get_submodule(name).scale for each in (fitted, learned))
    assert before.shape == (2, 2) and not torch.equal(before, after)
    assert torch.equal(restored.get_submodule(name).scale, after) and torch.equal(
        restored(x, T), learned(x, T)
    )


def test_map_has_a_row_without_multiply_adds(net):
    macs = trace(net, EXAMPLE).macs
    plain, split = (
        quantization_map(net, convert(net, wanted), macs)
        for wanted in (rules(8, 8), [*rules(8, 8), asked_for(6)])
    )
    for facts, bits in ((plain, 32), (split, 6)):
        rows = [row for row in facts["layers"] if row["role"] == "scale_shift"]
        assert len(rows) == 5 and {
            (row["input_bits"], row["params"], row["macs"]) for row in rows
        } == {(bits, 0, 0)}
        line = next(
            line for line in format_map(facts).splitlines() if "middle_block.0.emb_layers.2" in line
        )
        assert line.split()[1:6] == ["scale_shift", "-", str(bits), "0", "0.00"]
    assert all(plain[key] == split[key] for key in ("params_share", "macs_share"))


def test_widths_by_step_reach_it(net):
    wanted = [*rules(4, 8), asked_for(8)]
    again = convert(net, wanted + input_rules(convert(net, wanted), {"bits": 5}))
    assert {m.input_quantizer.spec.bits for m in operands(again).values()} == {5}

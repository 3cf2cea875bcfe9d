"""The packed file: bits in their place, its size, the same network in another process, what is
wrong with it."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, randomize
from safetensors.torch import save_file
from tiny import SHAPE, WEIGHT_8, normal, quantized, rules

from base.files import load_tensors, save_tensors
from models.zoo import build_network
from quant import packing
from quant.checkpoint import (
    load_quantized,
    packed_bytes,
    quantized_state,
    read_recipe,
    save_quantized,
    stored_names,
)
from quant.convert import convert
from quant.network import input_quantizers, quant_layers
from quant.packing import pack, unpack

ROOT = Path(__file__).resolve().parents[2]
T = torch.tensor([10.0, 800.0])
HASH = "0123456789abcdef" * 4


def saved(net, path, wanted, **more):
    """A quantized network and its file."""
    quant = quantized(net, path.parent, wanted, **more)
    save_quantized(
        path, quant, {"name": "tiny", "network": TINY, "rules": wanted, "weights_hash": HASH}
    )
    return quant


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_is_a_row_of_bits_least_significant_first(bits):
    for count in (*range(1, 34), 1000):
        codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
        packed = pack(codes, bits)
        assert packed.dtype == torch.uint8 and len(packed) == -(-count * bits // 8)
        number = sum(code << (bits * i) for i, code in enumerate(codes.tolist()))
        assert int.from_bytes(packed.numpy().tobytes(), "little") == number
        assert torch.equal(unpack(packed, bits, (count,)), codes.to(torch.uint8))


def test_four_bits_are_two_per_byte_low_nibble_first():
    assert pack(torch.tensor([1, 2, 3, 15, 7]), 4).tolist() == [0x21, 0xF3, 0x07]
    assert pack(torch.tensor([200, 3]), 8).tolist() == [200, 3]


@pytest.mark.parametrize("bits", [2, 3, 5, 7, 8])
def test_packing_in_pieces_changes_nothing(bits, monkeypatch):
    codes = torch.from_numpy(np.random.default_rng(0).integers(0, 2**bits, (5, 7, 3)))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "CHUNK", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, (5, 7, 3)), codes.to(torch.uint8))


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_file_is_little_more_than_bits_over_32_of_the_float_weights(bits, tmp_path):
    net = randomize(build_network(**TINY | {"ch": 48})).eval()
    net.requires_grad_(False)
    saved(net, tmp_path / "q.safetensors", [{"weight": {"bits": bits, "per": "channel"}}])
    share = (tmp_path / "q.safetensors").stat().st_size / (
        4 * sum(p.numel() for p in net.parameters())
    )
    assert bits / 32 < share < bits / 32 + 0.03  # scales, biases, norms and names


VARIANTS = {
    "w4a8": dict(wanted=rules(4, 8)),
    "w3a32": dict(wanted=rules(3, 32)),
    "w32a8": dict(wanted=rules(32, 8)),
    "symmetric, per tensor": dict(
        wanted=[{"weight": {"bits": 5, "symmetric": True}, "input": {"bits": 8, "symmetric": True}}]
    ),
    "segments": dict(wanted=rules(8, 8), boundaries=[300, 600.5]),
    "mixed": dict(
        wanted=[
            {"weight": WEIGHT_8, "input": {"bits": 8, "per": "channel"}},
            {"kind": "matmul", "input": {"bits": 8, "per": "tensor"}},
            {"role": "stem", "weight": {"bits": 32}, "input": {"bits": 32}},
        ]
    ),
    "balanced": dict(
        wanted=rules(4, 8) + [{"match": "mid.*", "kind": "layer", "balance": True}],
        passes=[{"balance": {"num_samples": 6, "num_alphas": 2}}, "fit_ranges"],
    ),
    "log2": dict(
        wanted=rules(4, 8)
        + [{"kind": "matmul", "role": "probs", "input": {"bits": 4, "grid": "log2"}}]
    ),
    "widths of segments": dict(
        wanted=rules(4, 8) + [{"input": {"segment_bits": [8, 6, 3]}}], boundaries=[300, 600.5]
    ),
    "shared scales": dict(
        wanted=rules(4, 8),
        boundaries=[200, 400, 600],
        passes=["fit_ranges", {"group_scales": {"groups": 2}}],
    ),
    "scales of an MLP": dict(
        wanted=rules(4, 8),
        boundaries=[300, 600.5],
        passes=["fit_ranges", {"dynamic_scales": {"warm_steps": 3}}],
    ),
}
# What makes a variant one, of the loaded network: name of a quantized layer or an activation
# quantizer, what it shows.
SHOWN = {
    "balanced": ("mid.block_1.conv1", lambda layer: len(layer.inverse_balance.unique()) > 1),
    "log2": (
        "mid.attn_1.av_matmul.b_quantizer",
        lambda q: q.spec.grid == "log2" and float(q.scale) == 2**-14,
    ),
    "widths of segments": ("conv_out.input_quantizer", lambda q: q.bits == [8, 6, 3]),
    "shared scales": (
        "conv_out.input_quantizer",
        lambda q: len(q.scale) == 4 and len(q.scale.unique()) == 2,
    ),
    "scales of an MLP": ("conv_out.input_quantizer", lambda q: len(q.scale.unique()) == 3),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_loaded_network_is_bit_identical(variant, tiny_net, tmp_path):
    net, x = saved(tiny_net, tmp_path / "q.safetensors", **VARIANTS[variant]), normal(2, *SHAPE)
    loaded = load_quantized(tmp_path / "q.safetensors", build_network, expected=HASH)
    assert torch.equal(loaded(x, T), net(x, T))
    if variant in SHOWN:
        name, shown = SHOWN[variant]
        assert shown(loaded.get_submodule(name))
    before, after = stored_names(net), stored_names(loaded)
    assert before.keys() == after.keys() and all(
        torch.equal(before[name], after[name]) for name in before
    )
    save_quantized(
        tmp_path / "again.safetensors", loaded, read_recipe(tmp_path / "q.safetensors")[0]
    )
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "q.safetensors"
    ).read_bytes()


def test_times_between_those_of_the_table_have_the_nearest_steps_scales(tiny_net, tmp_path):
    saved(tiny_net, tmp_path / "q.safetensors", rules(4, 8), boundaries=[300, 600.5])
    net, x = load_quantized(tmp_path / "q.safetensors", build_network), normal(1, *SHAPE)
    for q in input_quantizers(net).values():  # one step's scales alone
        q.scale.data[0], q.scale.data[2] = torch.nan, torch.nan
    finite = [
        t
        for t in (0.0, 299.0, 301, 450, 600, 601, 999)
        if net(x, torch.tensor([t])).isfinite().all()
    ]
    assert finite == [301, 450, 600]


def test_another_process_gives_the_same_bits(tiny_net, tmp_path):
    net, x = saved(tiny_net, tmp_path / "q.safetensors", rules(4, 8)), normal(2, *SHAPE)
    save_file({"x": x, "t": T}, tmp_path / "in.safetensors")
    script = """if True:
        import sys
        from safetensors.torch import load_file, save_file
        from models.zoo import build_network
        from quant.checkpoint import load_quantized
        net, given = load_quantized("q.safetensors", build_network), load_file("in.safetensors")
        save_file({"out": net(given["x"], given["t"]).detach()}, "out.safetensors")"""
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        check=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert torch.equal(load_tensors(tmp_path / "out.safetensors")[0]["out"], net(x, T))


def test_codes_in_the_file_are_unsigned_integers_of_the_weight(tiny_net, tmp_path):
    net = saved(tiny_net, tmp_path / "q.safetensors", rules(4, 8))
    tensors, _ = load_tensors(tmp_path / "q.safetensors")
    for name, layer in quant_layers(net).items():
        codes = unpack(tensors[f"{name}.weight_codes"], 4, layer.shape).float()
        q = layer.weight_quantizer
        assert torch.equal(codes - q.table(q.zero_point, codes), layer.weight_int)
        assert (
            f"{name}.weight" not in tensors
            and tensors[f"{name}.weight_quantizer.zero_point"].dtype == torch.uint8
        )


def assert_refused(path, complaint, **more):
    with pytest.raises(ValueError, match=complaint) as caught:
        load_quantized(path, build_network, **more)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


def test_weights_of_another_model_are_refused(tiny_net, tmp_path):
    saved(tiny_net, tmp_path / "q.safetensors", rules(4, 8))
    assert_refused(
        tmp_path / "q.safetensors",
        "other weights of 'tiny' .hash 0123456789ab, .* has ffffffffffff",
        expected="f" * 64,
    )


@pytest.mark.parametrize("size", [0, 5, 300, -1])
def test_truncated_file_is_refused(size, tiny_net, tmp_path):
    path = tmp_path / "q.safetensors"
    saved(tiny_net, path, rules(4, 8))
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(path, "is cut off or no safetensors file")


def test_foreign_and_missing_files_are_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "q.safetensors")
    assert_refused(
        tmp_path / "q.safetensors", "not a quantized model .* .format 'None', expected 'tinydm-"
    )
    assert_refused(tmp_path / "absent.safetensors", "does not exist; scripts/quantize.py makes it")


@pytest.mark.parametrize(
    "name, change, complaint",
    [
        (
            "conv_in.weight_codes",
            lambda v: v[:-1],
            "conv_in has 107 bytes, which does not fit .8, 3, 3, 3. at 4 bits",
        ),
        (
            "conv_in.bias",
            lambda v: v[:-1],
            "does not fit its own recipe .1 tensors, first conv_in.bias",
        ),
        ("conv_in.weight_quantizer.scale", lambda v: v[:, :-1], "does not fit its own recipe"),
        ("conv_in.weight_quantizer.zero_point", lambda v: v[:, :1], "does not fit its own recipe"),
        ("conv_in.weight_quantizer.zero_point", lambda v: v[:, :-1], "does not fit its own recipe"),
        ("conv_in.weight_quantizer.zero_point", lambda v: None, "does not fit its own recipe"),
        (
            "conv_in.input_quantizer.scale",
            lambda v: v.expand(3, 1).clone(),
            "does not fit its own recipe",
        ),
        ("conv_in.weight_codes", lambda v: None, "does not fit its own recipe"),
        (
            "something.else",
            lambda v: torch.ones(1),
            "does not fit its own recipe .1 tensors, first something.else",
        ),
    ],
)
def test_tampered_file_is_refused(name, change, complaint, tiny_net, tmp_path):
    path = tmp_path / "q.safetensors"
    saved(tiny_net, path, rules(4, 8))
    tensors, meta = load_tensors(path)
    tensors[name] = change(tensors.get(name))
    save_tensors(path, {k: v for k, v in tensors.items() if v is not None}, meta)
    assert_refused(path, complaint)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_expected_bytes_are_those_of_the_stored_tensors(tiny_net, tmp_path, bits):
    soft, hard = convert(tiny_net, rules(bits, 8)), quantized(tiny_net, tmp_path, rules(bits, 8))
    stored = sum(t.numel() * t.element_size() for t in quantized_state(hard).values())
    assert packed_bytes(soft) == packed_bytes(hard) == stored

"""Products of activations, and every layer of whole networks, in integer arithmetic bit for bit."""

import pytest
import torch
from conftest import TINY, assert_close, randomize
from integer_layers import integer_layer, integers
from tiny import SHAPE, fit, make_job, normal, rules

from base.network import Matmul
from models.zoo import build_network
from quant.layers import SWAP, QuantLayer, QuantMatmul
from quant.network import modules_of, quant_layers
from quant.passes.run import run_passes
from quant.spec import QuantSpec
from quant.timeline import Timeline

LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
    "num_heads": 2,
    "use_spatial_transformer": True,
    "context_dim": 6,
}
FUSED = LDM | {"use_spatial_transformer": False, "context_dim": None}


def by_integers(m, layer, operands, segment):
    """What a hardened layer or product gives of its float inputs, in int64 until the scales
    come."""
    if isinstance(m, QuantMatmul):
        scales = [q.scale[segment][q.group_of] for q in (m.a_quantizer, m.b_quantizer)]
        codes = [
            integers(x, s, q.zero_point[segment][q.group_of], 6, False)
            for x, s, q in zip(operands, scales, (m.a_quantizer, m.b_quantizer))
        ]
        return (codes[0] @ codes[1]).float() * (scales[0] * scales[1])
    (x,) = operands
    column, q, w, out, start = [-1, *[1] * m.trailing], m.input_quantizer, m.weight_quantizer, 0, 0
    x = x * m.inverse_balance.reshape(column)
    for part, width in enumerate(m.parts):
        columns, rows = (
            slice(start, start + width),
            slice(part * m.shape[0], (part + 1) * m.shape[0]),
        )
        x_part = x[:, columns] if len(m.parts) > 1 else x
        codes = integers(x_part, q.scale[segment, part], q.zero_point[segment, part], 6, False)
        term = integer_layer(codes, m.weight_int[:, columns].long(), layer).float()
        term = term * (q.scale[segment, part] * w.scale[0, rows].reshape(column))
        if part == 0 and m.bias is not None:
            term = term + m.bias.detach().reshape(column)
        out, start = out + term, start + width
    return out


@pytest.mark.parametrize("network", [TINY, LDM, FUSED])
def test_every_layer_of_a_network_is_integer_arithmetic_bit_for_bit(network, tmp_path):
    """Balanced, in several time segments: what each module of the running network read and gave."""
    net = randomize(build_network(**network)).eval().requires_grad_(False)
    context = network.get("context_dim") or 0
    job = make_job(
        net, tmp_path, [rules(4, 6)[0] | {"balance": True}], boundaries=[500], context=context
    )
    for layer in quant_layers(job.net).values():
        layer.balance((0.3 * normal(layer.shape[1], seed=1)).exp())
    run_passes(job, ["fit_ranges"])
    quant = job.net
    modules = {
        name: m for name, m in modules_of(quant).items() if isinstance(m, (QuantLayer, QuantMatmul))
    }
    assert modules.keys() == {name for name, m in net.named_modules() if type(m) in SWAP}
    assert any(len(getattr(m, "parts", ())) > 1 for m in modules.values())
    seen = {}
    for name, m in modules.items():
        m.register_forward_hook(
            lambda m, operands, out, name=name: seen.update({name: (operands, out)})
        )
    for segment, t in enumerate((100.0, 900.0)):
        seen.clear()
        quant(
            normal(2, *SHAPE, seed=7), torch.full((2,), t), *([normal(2, 4, 6)] if context else [])
        )
        assert seen.keys() == modules.keys()
        for name, (operands, out) in seen.items():
            expected = by_integers(modules[name], net.get_submodule(name), operands, segment)
            assert torch.equal(out, expected), name


@pytest.mark.parametrize("symmetric", [False, True])
def test_product_of_two_quantized_activations_bit_for_bit(symmetric):
    """(q_a - z_a) @ (q_b - z_b) * (s_a * s_b)"""
    spec, a, b = (
        QuantSpec(bits=8, symmetric=symmetric),
        normal(3, 4, 6),
        normal(3, 6, 5, seed=1).abs(),
    )
    product = fit(QuantMatmul(Matmul("q", "k"), [spec, spec], Timeline()), a, b)
    qa, qb = product.a_quantizer, product.b_quantizer
    codes = [
        integers(x, q.scale[0, 0], q.zero_point[0, 0], 8, symmetric) for x, q in ((a, qa), (b, qb))
    ]
    assert torch.equal(
        product(a, b), (codes[0] @ codes[1]).float() * (qa.scale[0, 0] * qb.scale[0, 0])
    )
    assert_close(product(a, b), a @ b, 0.03)


def test_product_with_one_operand_left_alone():
    a, b = normal(3, 4, 6), normal(3, 6, 5, seed=1)
    product = fit(QuantMatmul(Matmul("q", "k"), [QuantSpec(), QuantSpec(bits=4)], Timeline()), a, b)
    q = product.b_quantizer
    assert product.a_quantizer is None
    assert torch.equal(product(a, b), a @ q.codes(b) * q.scale[0, 0])


@pytest.mark.parametrize("heads", [1, 3])
def test_product_per_head_equals_a_loop_over_heads(heads):
    a, b = (
        normal(2, heads, 5, 4),
        normal(2, heads, 4, 6, seed=1) * torch.arange(1.0, heads + 1)[:, None, None],
    )
    spec = QuantSpec(bits=4, per="head")
    product = fit(QuantMatmul(Matmul("q", "k", num_heads=heads), [spec, spec], Timeline()), a, b)
    assert product.a_quantizer.scale.shape == (1, heads)
    single = [
        fit(QuantMatmul(Matmul("q", "k"), [QuantSpec(bits=4)] * 2, Timeline()), a[:, h], b[:, h])
        for h in range(heads)
    ]
    expected = torch.stack([one(a[:, h], b[:, h]) for h, one in enumerate(single)], dim=1)
    assert torch.equal(product(a, b), expected)

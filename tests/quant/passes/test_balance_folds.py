"""Balancing a network leaves what it computes: folds are exact, others are refused."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_close, randomize
from tiny import EXAMPLE, SHAPE, fit, make_job, normal, rules, samples

from base.network import attention_parts
from models.zoo import build_network
from quant.folds import check_folds, fold_into_norm, scale_rows
from quant.layers import QuantMatmul
from quant.network import quant_layers, set_input_quantization
from quant.passes.balance import (
    PRODUCT_SAMPLES,
    balance,
    balance_product,
    balance_vector,
    channel_max,
    fold_into_values,
)
from quant.passes.run import run_passes
from quant.reconstruction.capture import inputs_of
from quant.spec import QuantSpec
from quant.timeline import Timeline

RULES = [
    {
        "weight": {"bits": 4, "per": "channel", "range": "mse"},
        "input": {"bits": 4, "range": "mse"},
        "balance": True,
    }
]


LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1],
    "channel_mult": [1],
}


NETWORKS = [
    TINY,
    LDM | {"num_head_channels": 16},
    LDM | {"num_head_channels": 16, "use_new_attention_order": True},
    LDM | {"num_heads": 2, "use_spatial_transformer": True, "context_dim": 6},
]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("boundaries", [(), (500,)])
def test_balance_alone_leaves_the_networks_output(network, boundaries, tmp_path):
    net = randomize(build_network(**network)).eval().requires_grad_(False)
    context = "context_dim" in network
    job = make_job(net, tmp_path, RULES, boundaries=boundaries, context=6 if context else 0)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    facts = balance(job, num_samples=6, num_alphas=3)
    assert sum(f["alpha"] is not None for f in facts) > len(facts) / 2
    assert all(f["error_after"] <= f["error_before"] for f in facts)
    full_precision(job)
    arguments = (
        normal(3, *SHAPE, seed=5),
        torch.tensor([1.0, 450, 990]),
        *([normal(3, 4, 6)] if context else []),
    )
    expected = net(*arguments)
    largest = max(1, float(expected.abs().max()))
    assert (job.net(*arguments) - expected).abs().max() <= 1e-5 * largest
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def full_precision(job):
    """The job's network, its quantizers off."""
    set_input_quantization(job.net, False)
    for layer in quant_layers(job.net).values():
        layer.weight_quantizer.enabled = False
    return job.net


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_any_alpha_imposed_on_every_layer_leaves_the_networks_output(alpha, tiny_net, tmp_path):
    job, uneven = make_job(tiny_net.requires_grad_(False), tmp_path, RULES), []
    layers = quant_layers(job.net)
    data = inputs_of(tiny_net, list(layers), job.calibration, 10)
    for name, layer in layers.items():
        weight_max = layer.weight.movedim(1, 0).flatten(1).abs().amax(1)
        s = balance_vector(channel_max(data[name], layer.trailing), weight_max, alpha)
        layer.balance(s)
        uneven.append(float(s.max() / s.min()) > 1.2)
    arguments = normal(3, *SHAPE, seed=5), torch.tensor([1.0, 450, 990])
    assert sum(uneven) > len(layers) / 2
    assert_close(full_precision(job)(*arguments), tiny_net(*arguments), 1e-5)


@pytest.mark.parametrize("enabled", [True, False])
def test_balance_by_ones_is_bit_identical_to_none(enabled, tiny_net, tmp_path):
    """Folded wherever there is a fold, with and without quantization."""
    plain, job = (
        make_job(tiny_net.requires_grad_(False), tmp_path, [rules(4, 4)[0] | {"balance": on}])
        for on in (False, True)
    )
    for layer in quant_layers(job.net).values():
        layer.balance(torch.ones(layer.shape[1]))
    parts = attention_parts(job.net.net)
    for part in parts:
        fold_into_norm(job.net, part, [job.net.get_submodule(name) for name in part.readers])
        for name, rows in ((part.q, part.q_rows), (part.k, part.k_rows), (part.v, part.v_rows)):
            scale_rows(job.net.get_submodule(name), rows, torch.ones(len(rows)))
    nets = []
    for each in (plain, job):
        if enabled:
            run_passes(each, ["fit_ranges"])
        nets.append(each.net if enabled else full_precision(each))
    arguments = normal(3, *SHAPE, seed=5), torch.tensor([1.0, 450, 990])
    assert parts and torch.equal(nets[1](*arguments), nets[0](*arguments))


def test_what_a_norm_feeds_is_folded_and_what_silu_feeds_is_not(tiny_net, tmp_path):
    job = make_job(tiny_net.requires_grad_(False), tmp_path, RULES)
    balance(job, num_samples=6, num_alphas=3)
    layers = quant_layers(job.net)
    for name in ("q", "k", "v"):
        assert torch.equal(layers[f"mid.attn_1.{name}"].inverse_balance, torch.ones(16))
    assert not torch.equal(job.net.net.mid.attn_1.norm.weight, tiny_net.mid.attn_1.norm.weight)
    assert not torch.equal(layers["mid.block_1.conv1"].inverse_balance, torch.ones(16))
    assert torch.equal(job.net.net.mid.block_1.norm1.weight, tiny_net.mid.block_1.norm1.weight)


@pytest.mark.parametrize("network", NETWORKS)
def test_any_fold_leaves_the_networks_output(network, tmp_path):
    """Norm -> q, k, v; q <-> k; v -> proj; by factors between 1/4 and 4."""
    net = randomize(build_network(**network)).eval().requires_grad_(False)
    context = "context_dim" in network
    job = make_job(net, tmp_path, RULES, context=6 if context else 0)

    def factors(count, seed):
        return 4 ** (2 * torch.rand(count, generator=torch.Generator().manual_seed(seed)) - 1)

    parts = attention_parts(job.net.net)
    assert parts
    for i, part in enumerate(parts):
        readers, q, k, v, proj = [
            [job.net.get_submodule(n) for n in part.readers],
            *map(job.net.get_submodule, (part.q, part.k, part.v, part.proj)),
        ]
        s, between, u = (
            factors(*each)
            for each in (
                (readers[0].shape[1], i),
                (len(part.q_rows), i + 50),
                (proj.shape[1], i + 90),
            )
        )
        for layer in readers:
            layer.balance(s)
        fold_into_norm(job.net, part, readers)
        scale_rows(q, part.q_rows, 1 / between)
        scale_rows(k, part.k_rows, between)
        proj.balance(u)
        scale_rows(v, part.v_rows, proj.inverse_balance)
        proj.inverse_balance = torch.ones_like(u)
    arguments = (
        normal(3, *SHAPE, seed=5),
        torch.tensor([1.0, 450, 990]),
        *([normal(3, 4, 6)] if context else []),
    )
    assert_close(full_precision(job)(*arguments), net(*arguments), 1e-5)


def test_an_uneven_channel_of_v_is_folded_into_its_rows(tiny_net, tmp_path):
    tiny_net.requires_grad_(False).mid.attn_1.v.weight[5] *= 50
    tiny_net.mid.attn_1.proj_out.weight[:, 5] /= 50
    job = make_job(tiny_net, tmp_path, RULES)
    facts = balance(job, num_samples=6, num_alphas=3)
    assert next(f for f in facts if f["layers"] == ["mid.attn_1.proj_out"])["alpha"] is not None
    assert torch.equal(job.net.net.mid.attn_1.proj_out.inverse_balance, torch.ones(16))
    ratio = (job.net.net.mid.attn_1.v.weight / tiny_net.mid.attn_1.v.weight)[:, :, 0, 0].mean(1)
    assert ratio.argmin() == 5 and float(ratio[5]) < 0.1


@pytest.mark.parametrize("error_folded, folds", [(0.0, True), (0.1, False)])
def test_values_take_the_balance_only_where_their_product_loses_nothing(
    tiny_net, tmp_path, monkeypatch, error_folded, folds
):
    job = make_job(tiny_net.requires_grad_(False), tmp_path, RULES)
    part, errors = attention_parts(job.net.net)[0], iter([0.0, error_folded])
    proj, v = job.net.get_submodule(part.proj), job.net.get_submodule(part.v)
    # powers of two: no error but the planted one
    s = 2.0 ** (torch.arange(16) % 3 - 1)
    proj.balance(s)
    monkeypatch.setattr(
        "quant.passes.balance.quantized_product",
        lambda net, name, a, b, sample: a @ b + next(errors),
    )
    fold_into_values(job, part, job.calibration)
    assert torch.equal(proj.inverse_balance, torch.ones(16) if folds else 1 / s)
    rows = tiny_net.get_submodule(part.v).weight
    assert torch.equal(v.weight, rows / s[:, None, None, None] if folds else rows)


@pytest.mark.parametrize("network", NETWORKS)
def test_an_uneven_dimension_of_q_is_shared_with_k(network, tmp_path):
    """50 times larger in q, as much smaller in k."""
    net = randomize(build_network(**network)).eval().requires_grad_(False)
    part = attention_parts(net)[0]
    for name, rows, gain in ((part.q, part.q_rows, 50), (part.k, part.k_rows, 1 / 50)):
        for value in net.get_submodule(name).parameters():
            value[rows[5]] *= gain
    job = make_job(net, tmp_path, RULES, context=6 if "context_dim" in network else 0)

    def operands(net):
        return inputs_of(net, [part.qk], job.calibration, 10, whole=True)[part.qk]

    def error(q, k):
        spec = QuantSpec(bits=4, range="mse")
        product = QuantMatmul(net.get_submodule(part.qk), (spec, spec), Timeline())
        return float((fit(product, q, k)(q, k) - q @ k).square().mean())

    q, k = operands(net)  # (N, [heads,] L, D), (N, [heads,] D, L)
    heads = [(q, k)] if q.dim() == 3 else zip(q.unbind(1), k.unbind(1))
    s = torch.tensor(
        [
            (float(a[:, :, d].abs().max()) / float(b[:, d].abs().max())) ** 0.5
            for a, b in heads
            for d in range(q.shape[-1])
        ]
    )
    facts = balance_product(job, part, job.calibration)
    assert facts["alpha"] == 1 and s.argmax() == 5 and s[5] > 30
    for name, rows, factors in ((part.q, part.q_rows, 1 / s), (part.k, part.k_rows, s)):
        found, layer = job.net.get_submodule(name), net.get_submodule(name)
        expected = layer.weight[rows].flatten(1) * factors[:, None]
        assert torch.allclose(found.weight[rows].flatten(1), expected, rtol=1e-5)
        assert layer.bias is None or torch.allclose(
            found.bias[rows], layer.bias[rows] * factors, rtol=1e-5
        )
    assert error(q, k) == pytest.approx(facts["error_before"], rel=1e-4)
    assert error(*operands(full_precision(job))) == pytest.approx(facts["error_after"], rel=1e-3)
    assert 10 * facts["error_after"] < facts["error_before"]


@pytest.mark.parametrize(
    "reader, found", [("mid.block_1.conv1", "none of the layers"), ("mid.attn_1.q", "mid.attn_1.k")]
)
def test_a_fold_through_silu_or_past_a_reader_is_refused(tiny_net, reader, found):
    """Why: silu(x / s) * s is not silu(x)."""
    part = next(p for p in attention_parts(tiny_net) if p.norm == "mid.attn_1.norm")
    norm = "mid.block_1.norm1" if "block" in reader else part.norm
    check_folds(tiny_net, [part], EXAMPLE)
    with pytest.raises(
        ValueError, match=f"{norm} cannot take the balance of {reader}: what it .* {found}"
    ):
        check_folds(tiny_net, [replace(part, norm=norm, readers=[reader])], EXAMPLE)


def test_the_pass_refuses_a_norm_that_feeds_something_else(tiny_net, tmp_path, monkeypatch):
    parts = [replace(part, norm="mid.block_1.norm1") for part in attention_parts(tiny_net)]
    monkeypatch.setattr("quant.passes.balance.attention_parts", lambda net: parts)
    with pytest.raises(ValueError, match="mid.block_1.norm1 cannot take the balance of"):
        balance(
            make_job(tiny_net.requires_grad_(False), tmp_path, RULES), num_samples=6, num_alphas=3
        )


def test_more_time_segments_than_samples_of_an_attention_product(tiny_net, tmp_path):
    steps = samples(40).t.sort().values
    between = ((steps[1:] + steps[:-1]) / 2).tolist()
    job = make_job(tiny_net, tmp_path, RULES, num=40, boundaries=between)
    assert job.net.timeline.num_segments == 40 > PRODUCT_SAMPLES
    few = [{"softmax_grid": {"num_samples": 4}}, {"balance": {"num_alphas": 2}}, "fit_ranges"]
    facts = run_passes(job, few)
    products = [f for f in facts if f.get("layers") == ["mid.attn_1.qk_matmul"]]
    assert len(products) == 1 and products[0]["error_after"] <= products[0]["error_before"]


def test_a_fold_that_changes_the_network_is_refused(tiny_net, tmp_path, monkeypatch):
    """The norm keeps what its readers have given up."""

    def half(net, part, layers):
        for layer in layers:
            layer.inverse_balance = torch.ones_like(layer.inverse_balance)

    job = make_job(tiny_net, tmp_path, [*rules(4, 4), {"balance": True}])
    other = replace(job, net=copy.deepcopy(job.net))
    run_passes(other, [{"balance": {"num_alphas": 3}}, "fit_ranges"])
    monkeypatch.setattr("quant.passes.balance.fold_into_norm", half)
    sentence = "balancing changed the full-precision network's answer by"
    with pytest.raises(ValueError, match=sentence):
        balance(job, num_alphas=3)

"""Channel-wise balancing: the product stays what it is, planted imbalance is found, and the
identity is never beaten by something worse."""

import copy
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_close, randomize
from tiny import EXAMPLE, SHAPE, fit, make_job, normal, rules, samples
from torch import nn

from base.network import tag
from models.zoo import build_network
from quant.layers import QuantLayer, QuantMatmul
from quant.network import quant_layers, set_input_quantization
from quant.passes.balance import (
    PRODUCT_SAMPLES,
    balance,
    balance_group,
    balance_product,
    balance_vector,
    channel_max,
    check_folds,
    error_with,
    fold_into_norm,
    fold_into_values,
    scale_rows,
)
from quant.passes.run import run_passes
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.saliency import attention_parts
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


def test_vector_is_smoothquants_over_its_geometric_mean():
    data, weight = torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 4.0, 0.25])
    raw = data**0.3 / weight**0.7
    expected = raw / raw.log().mean().exp()
    assert torch.allclose(balance_vector(data, weight, 0.3), expected, rtol=1e-5)
    assert torch.equal(balance_vector(torch.ones(5), torch.ones(5), 0.5), torch.ones(5))


def test_dead_channels_take_no_part():
    s = balance_vector(torch.tensor([4.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0]), 0.5)
    # one is alive, and its geometric mean is itself
    assert s.tolist() == [1.0, 1.0, 1.0]
    assert balance_vector(torch.zeros(2), torch.ones(2), 0.5).tolist() == [1.0, 1.0]
    small, ones = torch.tensor([5e-6, 4.0, 1.0]), torch.ones(3)
    assert balance_vector(small, ones, 1.0).tolist() == pytest.approx([1.0, 2.0, 0.5])
    assert balance_vector(ones, small, 0.0).tolist() == pytest.approx([1.0, 0.5, 2.0])
    assert float(balance_vector(torch.tensor([2e-5, 2.0]), torch.ones(2), 1.0)[0]) == pytest.approx(
        10**-2.5
    )


@pytest.mark.parametrize(
    "data, expected",
    [
        ([1e8, 1, 1], [1e3, 10 ** (-8 / 3), 10 ** (-8 / 3)]),
        ([1e8, 1e8, 1], [10 ** (8 / 3), 10 ** (8 / 3), 1e-3]),
    ],
)
def test_vector_stays_within_a_factor_of_a_thousand(data, expected):
    assert balance_vector(torch.tensor(data), torch.ones(3), 1.0).tolist() == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.parametrize("trailing, axis", [(2, 1), (1, 1), (0, 2)])
def test_channel_maximum_over_all_other_axes(trailing, axis):
    x = normal(2, 3, 4, 5) if trailing == 2 else normal(2, 3, 4)
    expected = [float(x.select(axis, c).abs().max()) for c in range(x.shape[axis])]
    assert channel_max(x, trailing).tolist() == expected


def planted(gain, in_weight):
    """64 -> 64 convolution, Gaussian; one channel larger in the data, and smaller in the weight
    with `in_weight`."""
    x, layer = normal(8, 64, 8, 8), tag("conv1", nn.Conv2d(64, 64, 3, padding=1, bias=False))
    layer.weight.data = normal(64, 64, 3, 3, seed=1)
    x[:, 5] *= gain
    if in_weight:
        layer.weight.data[:, 5] /= gain
    spec = dict(bits=4, range="mse")
    quant = QuantLayer(
        layer, QuantSpec(per="channel", **spec), QuantSpec(**spec), Timeline(), False, True
    )
    return quant.requires_grad_(False), x, layer(x).detach()


@pytest.mark.parametrize("gain", [10, 50])
def test_a_channel_large_in_the_data_and_small_in_the_weight_is_repaired(gain):
    quant, x, target = planted(gain, True)
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [0.0, 0.5, 1.0])
    assert facts["error_after"] * 10 < facts["error_before"]
    assert facts["alpha"] is not None and float(quant.inverse_balance[5]) < 0.5


@pytest.mark.parametrize("gain", [10, 50])
def test_a_channel_large_in_the_data_alone_never_ends_worse_than_the_identity(gain):
    quant, x, target = planted(gain, False)
    errors = [
        error_with(
            quant,
            balance_vector(channel_max(x, 2), quant.weight.abs().amax((0, 2, 3)), a),
            x,
            target,
            torch.zeros(8),
            Timeline(),
        )
        for a in (0.0, 0.5, 1.0)
    ]
    identity = error_with(quant, torch.ones(64), x, target, torch.zeros(8), Timeline())
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [0.0, 0.5, 1.0])
    assert facts["error_before"] == identity and facts["error_after"] == min([identity, *errors])


@pytest.mark.parametrize("gain, in_weight", [(10, True), (10, False), (50, False)])
def test_the_layer_is_left_with_the_best_vector(gain, in_weight):
    """Its error, measured anew, is the one reported."""

    def error(layer):
        return float((fit(layer, x)(x) - target).double().square().mean())

    quant, x, target = planted(gain, in_weight)
    weight_max = quant.weight.abs().amax((0, 2, 3))
    facts = balance_group(
        ["x"], [quant], x, torch.zeros(8), Timeline(), [a / 10 for a in range(11)]
    )
    assert torch.allclose(
        1 / quant.inverse_balance, balance_vector(channel_max(x, 2), weight_max, facts["alpha"])
    )
    assert error(quant) == pytest.approx(facts["error_after"], rel=1e-4)
    assert (
        error(quant)
        < error(planted(gain, in_weight)[0])
        == pytest.approx(facts["error_before"], rel=1e-4)
    )


def relative_errors(gain, in_weight):
    """Of the identity, then of alpha = 0, 0.1, ..., 1."""
    quant, x, target = planted(gain, in_weight)
    weight_max = quant.weight.abs().amax((0, 2, 3))
    vectors = [
        torch.ones(64),
        *(balance_vector(channel_max(x, 2), weight_max, a / 10) for a in range(11)),
    ]
    power = float(target.square().mean())
    return [error_with(quant, s, x, target, torch.zeros(8), Timeline()) / power for s in vectors]


@pytest.mark.parametrize("gain, without", [(10, 0.35), (50, 1.0)])
def test_the_channel_that_the_weight_makes_up_for_is_repaired_at_every_alpha(gain, without):
    """s removes the gain whatever alpha is: it is in the data's maximum as much as in the
    weight's."""
    identity, *errors = relative_errors(gain, True)
    assert identity == pytest.approx(without, rel=0.1) and errors == pytest.approx(
        [0.0245] * 11, rel=0.1
    )
    assert 10 * max(errors) < identity


def test_half_alpha_can_hurt_where_another_helps():
    """The channel dominates the output, so the identity, which quantizes it best, is hard to
    beat."""
    identity, *errors = relative_errors(50, False)
    assert errors[5] > 1.5 * identity and min(errors) < 0.95 * identity
    assert min(errors) == errors[10]


def test_a_smaller_gain_is_served_best_in_between():
    identity, *errors = relative_errors(10, False)
    assert identity == pytest.approx(0.171, rel=0.1) and min(errors) < 0.6 * identity
    assert 0 < errors.index(min(errors)) < 10


def test_balance_and_scales_of_time_segments_repair_together_what_neither_does_alone():
    """x = exp(a_t + b_c) * Gaussian, read by weights that make up for b_c: the range of (t, c) is a
    product of both."""
    t, a, b = (
        torch.tensor([100.0, 500, 900]).repeat(8),
        torch.tensor([-2.0, 0, 2]).repeat(8),
        1.5 * normal(32, seed=2),
    )
    x, errors = (a[:, None] + b).exp()[:, :, None, None] * normal(24, 32, 6, 6), {}
    for boundaries in ((), (300, 700)):
        for balanced in (False, True):
            timeline, layer = (
                Timeline(boundaries),
                tag("conv1", nn.Conv2d(32, 32, 3, padding=1, bias=False)),
            )
            layer.weight.data = normal(32, 32, 3, 3, seed=1) / b.exp()[:, None, None]
            target, spec = layer(x).detach(), dict(bits=4, range="mse")
            quant = QuantLayer(
                layer, QuantSpec(per="channel", **spec), QuantSpec(**spec), timeline, False, True
            )
            quant.requires_grad_(False)
            timeline.set_time(t)
            if balanced:
                balance_group(["x"], [quant], x, timeline.segments_of(t), timeline, [0.0, 0.5, 1.0])
                assert torch.allclose(-quant.inverse_balance.log(), b - b.mean(), atol=0.4)
            error = (fit(quant, x)(x) - target).square().mean((1, 2, 3)) / target.square().mean(
                (1, 2, 3)
            )
            errors[len(boundaries) > 0, balanced] = float(error.mean())
    together = errors.pop((True, True))
    assert together == pytest.approx(0.0245, rel=0.1) and 10 * together < min(errors.values())


def test_identity_wins_ties_and_leaves_the_layer_alone():
    quant, x, _ = planted(1, False)
    before = quant.weight.clone()
    facts = balance_group(["x"], [quant], x, torch.zeros(8), Timeline(), [])
    assert facts["alpha"] is None and torch.equal(quant.weight, before)
    assert torch.equal(quant.inverse_balance, torch.ones(64))


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
    assert (job.net(*arguments) - expected).abs().max() <= 1e-5 * max(
        1, float(expected.abs().max())
    )
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


def test_balance_behind_silu_is_exact():
    layer, norm = (
        tag("conv1", nn.Conv2d(8, 6, 3, padding=1)).requires_grad_(False),
        nn.GroupNorm(4, 8),
    )
    quant = QuantLayer(layer, QuantSpec(), QuantSpec(), Timeline(), False, True)
    quant.balance((normal(8, seed=1) * 0.5).exp())
    x = torch.nn.functional.silu(norm(normal(2, 8, 5, 5)))
    assert (quant(x) - layer(x)).abs().max() <= 1e-6


def test_more_time_segments_than_samples_of_an_attention_product(tiny_net, tmp_path):
    steps = samples(40).t.sort().values
    job = make_job(
        tiny_net, tmp_path, RULES, num=40, boundaries=((steps[1:] + steps[:-1]) / 2).tolist()
    )
    assert job.net.timeline.num_segments == 40 > PRODUCT_SAMPLES
    facts = run_passes(
        job, [{"softmax_grid": {"num_samples": 4}}, {"balance": {"num_alphas": 2}}, "fit_ranges"]
    )
    products = [f for f in facts if f.get("layers") == ["mid.attn_1.qk_matmul"]]
    assert len(products) == 1 and products[0]["error_after"] <= products[0]["error_before"]


def test_a_fold_that_changes_the_network_is_refused(tiny_net, tmp_path, monkeypatch):
    """The norm keeps what its readers have given up."""

    def half(net, part, layers):
        for layer in layers:
            layer.inverse_balance = torch.ones_like(layer.inverse_balance)

    job = make_job(tiny_net, tmp_path, [*rules(4, 4), {"balance": True}])
    run_passes(
        replace(job, net=copy.deepcopy(job.net)), [{"balance": {"num_alphas": 3}}, "fit_ranges"]
    )
    monkeypatch.setattr("quant.passes.balance.fold_into_norm", half)
    with pytest.raises(
        ValueError, match="balancing changed the full-precision network's answer by"
    ):
        balance(job, num_alphas=3)

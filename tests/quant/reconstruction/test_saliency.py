"""Received attention, the weights made of it, and where q, k and v lie in a network."""

import pytest
import torch
from conftest import TINY, assert_close, randomize
from tiny import SHAPE, make_job, normal, rules, samples

from base.network import attention_parts
from ddim.unet import AttnBlock
from ldm.attention import AttentionBlock, BasicTransformerBlock
from models.zoo import build_network
from quant.passes.run import run_passes
from quant.reconstruction import learn, loss
from quant.reconstruction.loss import lp
from quant.reconstruction.saliency import Saliency, received_attention, record_maps

LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [1, 2],
    "channel_mult": [1, 2],
    "num_head_channels": 16,
}
TRANSFORMER = LDM | {
    "attention_resolutions": [2],
    "use_spatial_transformer": True,
    "context_dim": 6,
}


def test_received_attention_is_the_column_sum_meaned_over_heads():
    probs = normal(2, 3, 5, 5).softmax(-1)
    expected = torch.tensor(
        [
            [
                sum(float(probs[n, h, i, p]) for h in range(3) for i in range(5)) / 3
                for p in range(5)
            ]
            for n in range(2)
        ]
    )
    assert torch.allclose(received_attention(probs), expected, atol=1e-6)
    assert torch.allclose(received_attention(probs).mean(1), torch.ones(2), atol=1e-5)
    assert torch.allclose(received_attention(torch.full((1, 4, 4), 0.25)), torch.ones(1, 4))


def queries_and_keys(net, arguments):
    """q and k, each (N, heads, D, L), of every self-attention, from what the projections of a
    network answer."""
    answers, found = {}, []
    for name, m in net.named_modules():
        m.register_forward_hook(lambda m, x, out, name=name: answers.__setitem__(name, out))
    net(*arguments)
    for name, m in net.named_modules():
        if isinstance(m, AttnBlock):
            found.append([answers[f"{name}.{x}"].flatten(2)[:, None] for x in "qk"])
        elif isinstance(m, AttentionBlock):
            found.append(
                answers[f"{name}.qkv"].unflatten(1, (m.attention.num_heads, 3, -1)).unbind(2)[:2]
            )
        elif isinstance(m, BasicTransformerBlock):
            found.append(
                [
                    answers[f"{name}.attn1.to_{x}"]
                    .transpose(1, 2)
                    .unflatten(1, (m.attn1.num_heads, -1))
                    for x in "qk"
                ]
            )
    return found


@pytest.mark.parametrize(
    "network, counts",
    [
        (TINY, {4: 4}),
        (LDM, {8: 3, 4: 4}),
        (TRANSFORMER, {4: 4}),
        (TRANSFORMER | {"channel_mult": [1, 2, 2]}, {4: 3, 2: 1}),
    ],
)
@torch.no_grad()
def test_recorded_maps_are_column_sums_of_the_softmax_of_self_attention_alone(network, counts):
    """The middle of the last network sees 4 pixels and as many tokens of the context."""
    net, calibration = (
        randomize(build_network(**network)).eval(),
        samples(6, context=network.get("context_dim", 0)),
    )
    maps, expected = record_maps(net, calibration, 4), {}
    for q, k in queries_and_keys(net, calibration.arguments(slice(0, 6))):
        received = torch.zeros(6, q.shape[3])
        for n in range(6):
            for head in range(q.shape[1]):
                for i in range(q.shape[3]):  # query
                    weights = (q[n, head, :, i] @ k[n, head] / q.shape[2] ** 0.5).exp()
                    received[n] += weights / weights.sum() / q.shape[1]
        expected.setdefault(round(q.shape[3] ** 0.5), []).append(received)
    assert {
        size: len(each) for size, each in expected.items()
    } == counts and maps.keys() == expected.keys()
    for size, each in expected.items():
        wanted = sum(each) / len(each)
        assert (wanted - 1).abs().max() > 0.1  # sums over the keys would be 1
        assert_close(maps[size], wanted, 1e-5)


def test_rows_of_the_map_are_keys_not_queries():
    """The product stores the map transposed; a key that all queries look at must stand out."""
    net = randomize(build_network(**TINY)).eval()
    block = net.mid.attn_1
    block.qk_matmul.forward = lambda q, k: (
        torch.zeros(len(q), 16, 16).index_fill(2, torch.tensor([3]), 50.0) * 100
    )
    w = record_maps(net, samples(2), 2)[4]
    assert (w[:, 3] > 4).all() and (w.argmax(1) == 3).all()


def test_weights_have_mean_one_and_kappa_zero_is_plain():
    net, calibration = randomize(build_network(**TINY)).eval(), samples(6)
    rows = torch.tensor([0, 5])
    for shape in ((2, 7, 8, 8), (2, 7, 4, 4), (2, 7, 2, 2)):
        omega = Saliency(net, calibration, 0.5, 4)(rows, torch.empty(shape))
        assert omega.shape == (2, 1, *shape[2:]) and torch.allclose(
            omega.mean((2, 3)), torch.ones(2, 1), atol=1e-5
        )
        assert (omega >= 0.5).all()
    assert torch.equal(
        Saliency(net, calibration, 0.0, 4)(rows, torch.empty(2, 7, 4, 4)), torch.ones(2, 1, 4, 4)
    )
    tokens = Saliency(net, calibration, 1.0, 4)(rows, torch.empty(2, 16, 7))
    assert tokens.shape == (2, 16, 1)
    assert torch.allclose(tokens[:, :, 0], record_maps(net, calibration, 4)[4][rows], atol=1e-5)
    assert Saliency(net, calibration, 0.5, 4)(rows, torch.empty(2, 7)) is None


def interpolation(size, wanted):
    """The matrix (wanted, size) of linear interpolation between the centres of pixels."""
    matrix = torch.zeros(wanted, size)
    for i in range(wanted):
        place = min(max((i + 0.5) * size / wanted - 0.5, 0), size - 1)
        low = int(place)
        matrix[i, low] += low + 1 - place
        matrix[i, min(low + 1, size - 1)] += place - low
    return matrix


@pytest.mark.parametrize("height, nearest", [(2, 2), (4, 2), (6, 8), (8, 8), (16, 8)])
def test_the_map_of_the_nearest_size_is_taken_and_resized(height, nearest):
    saliency = Saliency(randomize(build_network(**TINY)).eval(), samples(2), 0.25, 2)
    saliency.maps = {size: normal(3, size * size, seed=size).abs() for size in (8, 2)}
    rows, matrix, expected = (
        torch.tensor([2, 0]),
        interpolation(nearest, height),
        torch.empty(2, 1, height, height),
    )
    for n, row in enumerate(rows):
        w = matrix @ saliency.maps[nearest][row].reshape(nearest, nearest) @ matrix.T
        expected[n, 0] = 0.75 + 0.25 * w / w.mean()
    assert torch.allclose(saliency(rows, torch.empty(2, 7, height, height)), expected, atol=1e-5)
    tokens = saliency(rows, torch.empty(2, height * height, 7))
    assert torch.allclose(tokens, expected.reshape(2, -1, 1), atol=1e-5)


def test_weighted_loss_by_hand():
    a, b = torch.tensor([[[[1.0, 3.0]]]]), torch.zeros(1, 1, 1, 2)
    assert float(lp(a, b, 2, torch.tensor([[[[0.5, 1.5]]]]))) == (0.5 * 1 + 1.5 * 9) / 2


def test_reconstruction_weighs_every_error_by_the_full_precision_maps_of_its_samples(
    tiny_net, tmp_path, monkeypatch
):
    job, rows, found = make_job(tiny_net, tmp_path, rules(4, 32)), torch.tensor([7, 2, 5]), []
    monkeypatch.setattr(learn, "draw_rows", lambda *_: rows)
    monkeypatch.setattr(
        loss,
        "lp",
        lambda a, b, norm, weights: found.append((a, weights)) or lp(a, b, norm, weights),
    )
    run_passes(job, ["fit_ranges", {"reconstruct": {"weight_iters": 1, "saliency": 0.25}}])
    saliency = Saliency(tiny_net, job.calibration, 0.25, 64)
    for error, weights in found:
        assert weights is None if error.dim() == 2 else torch.equal(weights, saliency(rows, error))
        assert weights is None or weights.std() > 0.01
    assert [error.dim() for error, _ in found].count(4) == 16 and len(found) == 18


def test_no_attention_and_impossible_kappa():
    plain = build_network(**TINY | {"attn_resolutions": []})
    plain.mid.attn_1 = torch.nn.Identity()
    with pytest.raises(ValueError, match="saliency needs a network with self-attention"):
        Saliency(plain, samples(2), 0.5, 2)
    with pytest.raises(ValueError, match="saliency is 1.5; it must lie in 0 to 1"):
        Saliency(plain, samples(2), 1.5, 2)


@pytest.mark.parametrize("new_order", [False, True])
def test_rows_of_fused_attention_are_what_the_product_reads(new_order):
    net = randomize(build_network(**LDM, use_new_attention_order=new_order)).eval()
    part = next(p for p in attention_parts(net) if p.norm == "middle_block.1.norm")
    seen = {}
    block = net.middle_block[1]
    block.qkv.register_forward_hook(lambda m, x, out: seen.update(qkv=out))
    block.attention.qk_matmul.register_forward_pre_hook(lambda m, x: seen.update(q=x[0], k=x[1]))
    block.attention.av_matmul.register_forward_pre_hook(lambda m, x: seen.update(v=x[0]))
    net(normal(1, *SHAPE), torch.zeros(1))
    scale = 16**-0.25
    assert torch.allclose(
        seen["qkv"][:, part.q_rows] * scale, seen["q"].transpose(2, 3).flatten(1, 2)
    )
    assert torch.allclose(seen["qkv"][:, part.k_rows] * scale, seen["k"].flatten(1, 2))
    assert torch.equal(seen["qkv"][:, part.v_rows], seen["v"].flatten(1, 2))

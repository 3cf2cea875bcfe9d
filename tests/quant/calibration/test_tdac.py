"""TDAC: density and variety against loops over all pairs; counts that add up; features of the
middle attention."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from tiny import SHAPE, normal

from models.zoo import build_network
from quant.calibration.tdac import apportion, density, middle_features, rescaled, tdac, variety

LDM = {
    "family": "ldm-unet",
    "image_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "model_channels": 32,
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "channel_mult": [1, 1],
    "num_heads": 2,
}


def drifting(num_steps=12, num=3):
    """Features that wander, with a quiet stretch in the middle, (S, n, C, h, w)."""
    pace = torch.tensor([0.1 if 4 <= s < 9 else 0.8 for s in range(num_steps)])
    return (pace[:, None, None, None, None] * normal(num_steps, num, 8, 2, 2)).cumsum(0)


def density_by_loop(f, radius):
    return [
        sum(float(((f[i] - f[j]) ** 2).mean()) <= radius for j in range(len(f)) if j != i)
        for i in range(len(f))
    ]


def variety_by_loop(f):
    return [
        sum(
            float((1 - F.cosine_similarity(f[i], f[j], dim=1, eps=1e-6)).sum())
            for j in range(len(f))
            if j != i
        )
        for i in range(len(f))
    ]


@pytest.mark.parametrize("chunk", [5, 2**16])
def test_density_and_variety_equal_the_loop_over_pairs(monkeypatch, chunk):
    monkeypatch.setattr("quant.calibration.tdac.CHUNK", chunk)
    f = drifting()
    for radius in (0.05, 0.5, 3.0):
        assert density(f, radius).tolist() == density_by_loop(f.double(), radius)
    assert len(set(density(f, 0.5).tolist())) > 2
    torch.testing.assert_close(
        variety(f),
        torch.tensor(variety_by_loop(f.double()), dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )


def test_a_feature_of_zeros_counts_like_in_the_loop():
    f = drifting()
    f[3] = 0
    torch.testing.assert_close(
        variety(f),
        torch.tensor(variety_by_loop(f.double()), dtype=torch.float64),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("norm, cosine", [(1e-3, 1.0), (5e-7, 0.25)])
def test_a_norm_counts_in_full_above_a_millionth(norm, cosine):
    """The cosine is a . b over norms of at least 1e-6."""
    # all alike: 3 other steps, 2 images, 9 positions
    f = torch.full((4, 2, 16, 3, 3), norm / 4)
    assert variety(f).tolist() == pytest.approx([3 * 2 * 9 * (1 - cosine)] * 4, abs=1e-4)


def test_counts_by_hand():
    assert apportion(torch.tensor([1.0, 2.0, 1.0]), 8).tolist() == [2, 4, 2]
    # 3.33 each: one is missing
    assert apportion(torch.tensor([1.0, 1.0, 1.0]), 10).tolist() == [4, 3, 3]
    # 1.67 each: one too many
    assert apportion(torch.tensor([1.0, 1.0, 1.0]), 5).tolist() == [2, 2, 1]
    # 2.5 rounds to even
    assert apportion(torch.tensor([3.0, 3.0, 0.0]), 5).tolist() == [3, 2, 0]
    assert apportion(torch.zeros(4), 8).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("num", [1, 2, 7, 100, 1024])
def test_counts_add_up_and_are_never_negative(num):
    for seed in range(50):
        weight = torch.rand(100, generator=torch.Generator().manual_seed(seed)) ** 3
        counts = apportion(weight, num)
        assert int(counts.sum()) == num and int(counts.min()) >= 0
        assert (counts - num * weight / weight.sum()).abs().max() <= 1.5


@pytest.mark.parametrize(
    "features", [torch.ones(12, 3, 8, 2, 2), drifting(), torch.zeros(12, 3, 8, 2, 2)]
)
@pytest.mark.parametrize("num, lamda", [(5, 1.2), (64, 0.0), (64, 5.0)])
def test_set_has_the_size_asked_for_also_where_all_steps_are_alike(features, num, lamda):
    step, image = tdac(
        12, 7, num, torch.Generator().manual_seed(0), lambda: features, lamda=lamda, radius=0.5
    )
    assert (
        len(step) == num
        and step.min() >= 0
        and step.max() < 12
        and image.tolist() == [i % 7 for i in range(num)]
    )
    weight = rescaled(density(features, 0.5)) + lamda * rescaled(variety(features))
    assert torch.equal(step.bincount(minlength=12), apportion(weight, num))
    if features.min() == features.max():
        assert step.bincount(minlength=12).max() <= -(-num // 12)


def test_a_quiet_stretch_gets_more_samples():
    step, _ = tdac(12, 7, 120, torch.Generator().manual_seed(0), drifting, lamda=0.0, radius=0.5)
    counts = step.bincount(minlength=12)
    assert counts[4:8].min() > counts[9:].max()


def test_every_step_has_the_least_and_its_share_of_the_rest():
    features = drifting()
    weight = rescaled(density(features, 0.5)) + 1.2 * rescaled(variety(features))
    step, _ = tdac(
        12, 7, 60, torch.Generator().manual_seed(0), lambda: features, radius=0.5, least=3
    )
    assert step.bincount(minlength=12).tolist() == [
        3 + count for count in apportion(weight, 60 - 3 * 12).tolist()
    ]


@pytest.mark.parametrize("options", [{"lamda": -1.0}, {"least": -1}, {"least": 2}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(
        ValueError, match=r"must not be negative, least 0 to 1 \(20 samples, 12 steps\)"
    ):
        tdac(12, 7, 20, torch.Generator(), drifting, **options)


def model_around(net):
    return SimpleNamespace(net=net, eps=lambda x, t, cond: net(x, t))


def test_features_are_what_the_middle_attention_reads(tiny_net):
    x, t, expected = normal(3, 4, *SHAPE), torch.tensor([900, 500, 1]), []
    attention = tiny_net.mid.attn_1
    for x_t, step in zip(x, t):
        kept, attention.forward = [], lambda h: kept.append(h) or h
        tiny_net(x_t, step.float().expand(4))
        expected.append(kept[0])
        del attention.forward
    found = middle_features(model_around(tiny_net), x, t)
    assert found.shape == (3, 4, 16, 4, 4) and torch.equal(found, torch.stack(expected))
    assert not attention._forward_pre_hooks


def test_features_of_a_latent_network_and_of_one_without_a_middle():
    net, x, t = randomize(build_network(**LDM)).eval(), normal(2, 3, *SHAPE), torch.tensor([900, 1])
    assert middle_features(model_around(net), x, t).shape == (2, 3, 32, 4, 4)
    with pytest.raises(
        ValueError,
        match="no module mid.attn_1 or middle_block.1; choose another calibration.builder",
    ):
        middle_features(model_around(torch.nn.Conv2d(3, 3, 1)), x, t)

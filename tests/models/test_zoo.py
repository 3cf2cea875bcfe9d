"""Networks by family name, with every mistake named; a new one needs its file and a row."""

import pytest
import torch
from conftest import TINY, deviation, randomize
from safetensors.torch import save_file
from tiny import EXAMPLE, samples
from torch import nn

import quant
from base.network import AttentionPart, Matmul, attention_parts, tag, timestep_embedding
from ddim.unet import UNet
from models.diffusion import load_model
from models.zoo import NETWORKS, build_network
from quant.graph import trace


def test_builds_the_network():
    net = build_network(**TINY)
    assert isinstance(net, UNet) and net.ch == 8 and net.image_size == 8


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {**TINY, "family": "ddim-unett"},
            "network family 'ddim-unett' is unknown; did you mean 'ddim-unet'?",
        ),
        (
            {**TINY, "ch_mul": [1]},
            "network family 'ddim-unet' has no option 'ch_mul'; did you mean 'ch_mult'?",
        ),
        ({"family": "ddim-unet"}, "network family 'ddim-unet' needs image_size in the model YAML"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ValueError) as error:
        build_network(**options)
    assert str(error.value) == sentence


# ---- adding a network: its file and one row


class ToyBlock(nn.Module):
    """norm, swish, convolution; add the time embedding and the input."""

    is_unit = True

    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(2, width)
        self.conv = tag("conv1", nn.Conv2d(width, width, 3, padding=1))
        self.emb = tag("emb_proj", nn.Linear(width, width))

    def forward(self, x, emb):
        return x + self.conv(nn.functional.silu(self.norm(x))) + self.emb(emb)[:, :, None, None]


class ToyAttention(nn.Module):
    """One head over pixels."""

    is_unit = True

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q = tag("q", nn.Linear(width, width))
        self.k = tag("k", nn.Linear(width, width))
        self.v = tag("v", nn.Linear(width, width))
        self.qk, self.av = Matmul("q", "k"), Matmul("probs", "v")
        self.proj = tag("proj", nn.Linear(width, width))

    def attention_parts(self, name):
        q, k, v, proj = (f"{name}.{part}" for part in ("q", "k", "v", "proj"))
        rows = torch.arange(len(self.norm.weight))
        products = f"{name}.qk", f"{name}.av"
        return [
            AttentionPart(f"{name}.norm", [q, k, v], q, k, v, proj, *products, rows, rows, rows)
        ]

    def forward(self, x):
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.q(tokens), self.k(tokens), self.v(tokens)
        probs = self.qk(q, k.transpose(1, 2) / q.shape[2] ** 0.5).softmax(-1)
        return x + self.proj(self.av(probs, v)).transpose(1, 2).reshape(x.shape)


class ToyNet(nn.Module):
    def __init__(self, *, width, image_size=8, in_channels=3):
        super().__init__()
        self.width, self.image_size, self.in_channels = width, image_size, in_channels
        self.time = tag("temb", nn.Linear(width, width))
        self.stem = tag("stem", nn.Conv2d(in_channels, width, 3, padding=1))
        self.block, self.attention = ToyBlock(width), ToyAttention(width)
        self.out = tag("out", nn.Conv2d(width, in_channels, 3, padding=1))

    def forward(self, x, t):
        emb = self.time(timestep_embedding(t, self.width))
        return self.out(self.attention(self.block(self.stem(x), emb)))


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(NETWORKS, "toy", ToyNet)
    return randomize(build_network("toy", width=8)).eval()


TOY_RULES = [
    {"weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}, "balance": True},
    {"role": ["stem", "out", "temb"], "weight": {"bits": 8}, "balance": False},
    {"role": "probs", "input": {"bits": 8, "grid": "log2"}},
]


def test_a_new_network_describes_itself_to_the_library(toy):
    graph = trace(toy, EXAMPLE)
    # a lone layer is a unit; blocks say that they are one
    assert graph.units == ["time", "stem", "block", "attention", "out"]
    # 8 x 8 pixels; 3 x 3 x 3 and 3 x 3 x 8 products for each of 8 and 3 channels; L^2 * 8
    assert graph.macs["stem"] == 64 * 27 * 8 and graph.macs["out"] == 64 * 72 * 3
    assert graph.macs["attention.qk"] == graph.macs["attention.av"] == 64 * 64 * 8
    (part,) = attention_parts(toy)
    assert part.is_to_itself and part.layers == {f"attention.{x}" for x in ("q", "k", "v", "proj")}
    with pytest.raises(ValueError, match="'toy' has no option 'widht'; did you mean 'width'"):
        build_network("toy", widht=8)


def test_a_new_network_goes_through_every_kind_of_pass(toy, tmp_path):
    x, t = samples(16).x, samples(16).t
    with torch.no_grad():
        expected = toy(x, t)
    effort = {"weight_iters": 30, "input_iters": 10, "batch_size": 8}
    qnet, rows = quant.run_passes(
        quant.convert(toy, TOY_RULES),
        ["balance", "fit_ranges", {"reconstruct": effort}],
        toy,
        samples(16),
        resume=tmp_path / "resume",
    )
    assert {row["unit"] for row in rows if "unit" in row} == set(trace(toy, EXAMPLE).units)
    with torch.no_grad():
        assert torch.equal(toy(x, t), expected)  # the float one stays
        assert 0 < deviation(qnet(x, t), expected) < 0.2
    quant.save(qnet, tmp_path / "toy.safetensors")
    with torch.no_grad():
        again = quant.load(tmp_path / "toy.safetensors", toy)
        assert torch.equal(again(x, t), qnet(x, t))


def test_a_new_network_is_a_model_like_any_other(toy, tmp_path):
    save_file(toy.state_dict(), tmp_path / "toy.safetensors")
    config = {
        "name": "toy",
        "network": {"family": "toy", "width": 8},
        "checkpoint": str(tmp_path / "toy.safetensors"),
        "schedule": {},
        "sampling": {"sampler": "ddim", "steps": 3, "skip": "uniform", "eta": 0.0},
    }
    model = load_model(config, device="cpu")
    x, t = samples(4).x, samples(4).t
    with torch.no_grad():
        assert model.shape == (3, 8, 8) and torch.equal(model.eps(x, t, None), toy(x, t))

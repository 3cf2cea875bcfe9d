"""Both kinds of first stage give the recorded numbers, have the names and shapes of the public
ones, and train."""

import hashlib

import pytest
import torch
from conftest import assert_close, below, randomize, read_fixture

from ldm import autoencoder
from ldm.autoencoder import AutoencoderKL, AutoencoderVQ
from models.zoo import build_network

TINY = {
    "z_channels": 3,
    "resolution": 16,
    "ch": 8,
    "ch_mult": [1, 2, 2],
    "num_res_blocks": 1,
    "norm_groups": 4,
}
# The autoencoders inside the public checkpoints: keys, and SHA-256 of the sorted lines "key shape".
PUBLIC = {
    "autoencoder-kl": (
        248,
        "50f3b11a29b7157160b560d7d5f6efb72f882aec8c53fda4aeb592ed800e4e5f",
        83653863,
        {"embed_dim": 4, "ddconfig": {"double_z": True, "z_channels": 4, "ch_mult": [1, 2, 4, 4]}},
    ),
    "autoencoder-vq": (
        205,
        "c906ade7ecd44142db80d6ba0d760161b1229f1cec2365d4175d7a23a074ea74",
        55322782,
        {
            "embed_dim": 3,
            "n_embed": 8192,
            "ddconfig": {"double_z": False, "z_channels": 3, "ch_mult": [1, 2, 4]},
        },
    ),
}
PUBLIC_WIDTHS = {
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def tiny_kl(**ddconfig):
    return randomize(
        AutoencoderKL(embed_dim=2, ddconfig={**TINY, "double_z": True, **ddconfig})
    ).eval()


def tiny_vq(n_embed=12, **ddconfig):
    net = AutoencoderVQ(
        embed_dim=2, n_embed=n_embed, ddconfig={**TINY, "double_z": False, **ddconfig}
    )
    return randomize(net).eval()


@pytest.fixture(params=["kl", "vq"])
def recorded(request):
    """-> the network of a fixture, what it gives for the fixture's inputs, the fixture's tensors
    and tolerance."""
    meta, weights, tensors = read_fixture(f"{request.param}_autoencoder")
    options, scale = dict(meta["config"]["first_stage"]), meta["config"]["scale_factor"]
    net = build_network(f"autoencoder-{options.pop('kind')}", **options).eval()
    net.load_state_dict(below("first_stage/", weights))
    outputs = {"kl": kl_outputs, "vq": vq_outputs}[request.param]
    return net, lambda: outputs(net, scale, **below("in/", tensors)), tensors, meta["tolerance"]


def kl_outputs(net, scale, image, z, noise):
    mean, logvar = net.moments(image)
    return {
        "moments": net.quant_conv(net.encoder(image)),
        "mean": mean,
        "logvar": logvar,
        "std": (logvar / 2).exp(),
        "z_mode_scaled": scale * net.encode(image),
        "z_sample_scaled": scale * net.encode(image, noise),
        "image": net.decode(z / scale),
    }


def vq_outputs(net, scale, image, z):
    quantized, indices = net.nearest(z / scale)
    return {
        "prequant": net.encode(image),
        "prequant_scaled": scale * net.encode(image, torch.ones_like(z)),
        "quantized": quantized,
        "indices": indices,
        "image": net.decode(z / scale),
        "image_not_quantized": net.decode(z / scale, quantize=False),
    }


@torch.no_grad()
def test_recorded_values(recorded):
    _, outputs, tensors, tolerance = recorded
    found, expected = outputs(), below("out/", tensors)
    assert set(found) == set(expected)
    for name, value in found.items():
        assert_close(value, expected[name], 0 if name == "indices" else tolerance)


@torch.no_grad()
def test_recorded_values_of_every_stage(recorded):
    net, _, tensors, _ = recorded
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    net.encode(tensors["in/image"])
    net.decode(tensors["in/z"] / (0.18215 if isinstance(net, AutoencoderKL) else 1.0))
    for name, expected in below("tap/", tensors).items():
        found = seen[name][:1, :, ::2, ::2] if seen[name].shape[3] >= 16 else seen[name][:1]
        assert_close(found, expected, 1e-3)  # taps are recorded in half precision


@pytest.mark.parametrize("family", PUBLIC)
def test_public_first_stage_fits_strictly(family):
    num_keys, digest, parameters, options = PUBLIC[family]
    with torch.device("meta"):
        net = build_network(
            family, **{**options, "ddconfig": {**PUBLIC_WIDTHS, **options["ddconfig"]}}
        )
    lines = sorted(f"{name} {tuple(value.shape)}" for name, value in net.state_dict().items())
    assert (
        len(lines) == num_keys and hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest
    )
    assert sum(p.numel() for p in net.parameters()) == parameters


@torch.no_grad()
@pytest.mark.parametrize("make", [tiny_kl, tiny_vq])
def test_shapes_there_and_back(make):
    net = make(attn_resolutions=[8])
    assert net.downsampling == 4 and net.embed_dim == 2
    image = torch.rand(2, 3, 16, 24)
    z = net.encode(image)
    assert z.shape == (2, 2, 4, 6) and net.decode(z).shape == image.shape


def test_attention_sits_where_the_ddconfig_says():
    def attends(net):
        return {
            name
            for name, module in net.named_modules()
            if isinstance(module, autoencoder.AttnBlock)
        }

    middle = {"encoder.mid.attn_1", "decoder.mid.attn_1"}
    assert attends(tiny_kl()) == middle
    assert attends(tiny_kl(attn_resolutions=[8])) == middle | {
        "encoder.down.1.attn.0",
        "decoder.up.1.attn.0",
        "decoder.up.1.attn.1",
    }
    assert attends(tiny_kl(attn_resolutions=[8], attn_type="none")) == set()


def test_every_layer_has_a_role():
    for net in (tiny_kl(), tiny_vq()):
        assert all(hasattr(m, "role") for m in net.modules() if isinstance(m, torch.nn.Conv2d))


@torch.no_grad()
def test_kl_encoding_is_mean_plus_deviation_times_noise():
    net, image = tiny_kl(), torch.rand(1, 3, 16, 16)
    mean, logvar = net.moments(image)
    noise = torch.randn_like(mean)
    assert torch.equal(net.encode(image), mean)
    assert_close(net.encode(image, noise), mean + logvar.exp().sqrt() * noise, 1e-5)
    net.quant_conv.bias[2:] = torch.tensor([1e3, -1e3])
    logvar = net.moments(image)[1]
    assert (logvar[:, 0] == 20).all() and (logvar[:, 1] == -30).all()


def test_kl_divergence_equals_that_of_the_distributions():
    net, image, noise = tiny_kl(), torch.rand(2, 3, 16, 16), torch.zeros(2, 2, 4, 4)
    mean, logvar = net.moments(image)
    reconstruction, divergence = net(image, noise)
    law = torch.distributions.Normal(mean, (logvar / 2).exp())
    expected = (
        torch.distributions.kl_divergence(law, torch.distributions.Normal(0, 1))
        .sum(dim=(1, 2, 3))
        .mean()
    )
    assert_close(divergence.detach(), expected.detach(), 1e-5)
    assert_close(reconstruction.detach(), net.decode(mean).detach(), 1e-5)
    (reconstruction.mean() + divergence).backward()
    assert all(p.grad is not None for p in net.parameters())


def test_nearest_gives_the_recorded_values():
    meta, weights, tensors = read_fixture("primitives")
    net = tiny_vq()
    net.quantize.embedding = torch.nn.Embedding.from_pretrained(
        weights["vector_quantize/w/embedding.weight"]
    )
    quantized, indices = net.nearest(tensors["vector_quantize/in/z"])
    assert_close(quantized, tensors["vector_quantize/out/quantized"], meta["tolerance"])
    assert torch.equal(indices, tensors["vector_quantize/out/indices"])


@pytest.mark.parametrize("at_a_time", [1, 100, 2**24])
def test_nearest_equals_brute_force_however_it_is_cut(monkeypatch, at_a_time):
    monkeypatch.setattr(autoencoder, "DISTANCES", at_a_time)
    net, z = (
        tiny_vq(n_embed=30),
        torch.randn(2, 2, 5, 7, generator=torch.Generator().manual_seed(0)),
    )
    codes = net.quantize.embedding.weight.detach()
    # (N, K, h, w)
    distances = (z[:, None].double() - codes[None, :, :, None, None].double()).square().sum(2)
    quantized, indices = net.nearest(z)
    assert torch.equal(indices, distances.argmin(1))
    assert torch.equal(quantized[1, :, 4, 6], codes[indices[1, 4, 6]])


def test_the_first_of_equally_near_codes_is_taken():
    net = tiny_vq()
    net.quantize.embedding.weight.data = torch.tensor(
        [[3.0, 3.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]
    )
    assert net.nearest(torch.zeros(1, 2, 1, 1))[1].item() == 1


def test_gradient_passes_straight_through_the_codebook():
    net, image = tiny_vq(), torch.rand(2, 3, 16, 16)
    z = net.encode(image)
    z.retain_grad()
    codes = net.nearest(z)[0].detach().requires_grad_()
    net.encode = lambda image: z
    reconstruction, regulariser = net(image)
    assert_close(reconstruction.detach(), net.decode(z).detach(), 1e-5)
    (reconstruction**2).sum().backward(retain_graph=True)
    (net.decode(codes, quantize=False) ** 2).sum().backward()
    assert_close(z.grad, codes.grad, 1e-5)
    # the codes learn from the regulariser alone
    assert net.quantize.embedding.weight.grad is None

    z.grad = None
    regulariser.backward()
    assert_close(z.grad, autoencoder.COMMITMENT * 2 * (z - codes).detach() / z.numel(), 1e-5)
    assert_close(
        regulariser.detach(),
        (1 + autoencoder.COMMITMENT) * (z - codes).detach().square().mean(),
        1e-5,
    )
    assert net.quantize.embedding.weight.grad.abs().sum() > 0


def ddconfig(**changes):
    return {
        "family": "autoencoder-vq",
        "embed_dim": 2,
        "n_embed": 4,
        "ddconfig": {
            k: v for k, v in {**TINY, "double_z": False, **changes}.items() if v is not None
        },
    }


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            ddconfig(ch_mul=[1]),
            "the ddconfig of the autoencoder has no key 'ch_mul'; did you mean 'ch_mult'?",
        ),
        (
            ddconfig(ch=None, z_channels=None),
            "the ddconfig of the autoencoder needs z_channels, ch",
        ),
        (
            ddconfig(attn_type="linear"),
            "attn_type 'linear' of the ddconfig is unknown; known: vanilla, none",
        ),
        (
            ddconfig(double_z=True),
            "the ddconfig says double_z: True; expected true for an autoencoder-kl and false for "
            "an "
            "autoencoder-vq",
        ),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ValueError) as error:
        build_network(**options)
    assert str(error.value) == sentence

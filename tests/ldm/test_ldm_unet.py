"""The U-Net of improved, guided and latent diffusion gives the recorded numbers and fits the public
checkpoints."""

import gzip
import json

import pytest
import torch
from conftest import FIXTURES, assert_close, below, read_fixture
from ldm_nets import CONTEXT, OPTIONS, TINY, condition, inputs, tiny

from base.network import Matmul, Operand
from ddim.unet import Upsample
from ldm.attention import AttentionBlock, CrossAttention, QKVAttention, SpatialTransformer
from ldm.unet import Downsample, ResBlock
from models.zoo import build_network

LISTINGS = json.loads(gzip.decompress((FIXTURES / "latent_checkpoints.json.gz").read_bytes()))
FAMILIES = {
    "ldm": "ldm-unet",
    "stable": "ldm-unet",
    "improved": "improved-unet",
    "guided": "guided-unet",
}
WHOLE = (
    "ldm_unet_uncond",
    "ldm_unet_updown",
    "ldm_unet_class_xattn",
    "ldm_unet_text_xattn",
    "improved_unet",
    "guided_unet_new_order",
    "guided_unet_legacy_order",
)


@pytest.mark.parametrize("name", WHOLE)
def test_network_and_every_stage_give_the_recorded_values(name):
    meta, weights, tensors = read_fixture(name)
    net = build_network(meta["family"], **meta["config"]["unet"]).eval()
    net.load_state_dict(below("unet/", weights))
    assert (net.in_channels, net.image_size) == (
        tensors["in/x"].shape[1],
        meta["config"]["unet"].get("image_size"),
    )
    seen = {}
    for path, module in net.named_modules():
        module.register_forward_hook(lambda _, __, out, path=path: seen.__setitem__(path, out))
    cond = next(
        (tensors[key] for key in ("in/context", "out/context", "in/y") if key in tensors), None
    )
    with torch.no_grad():
        found = net(tensors["in/x"], tensors["in/t"], cond)
    for path, expected in below("tap/", tensors).items():
        tap = seen[path][:1]
        if tap.dim() == 4 and tap.shape[3] >= 16:
            tap = tap[..., ::2, ::2]
        assert_close(tap, expected, 1e-3)  # taps are recorded in half precision
    assert_close(
        found, tensors["out/eps" if "out/eps" in tensors else "out/model"], meta["tolerance"]
    )


PRIMITIVES = {
    "down_symmetric": lambda: Downsample(32, True),
    "up_nearest_conv": lambda: Upsample(32, True),
    "res_block_add": lambda: ResBlock(32, 64, 48),
    "res_block_scale_shift": lambda: ResBlock(32, 64, 48, scale_shift=True),
    "res_block_up": lambda: ResBlock(32, 32, 48, scale_shift=True, resample=Upsample(32, False)),
    "res_block_down": lambda: ResBlock(
        32, 32, 48, scale_shift=True, resample=Downsample(32, False)
    ),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_part_gives_the_recorded_values(name):
    meta, weights, tensors = read_fixture("primitives")
    module = PRIMITIVES[name]().eval()
    module.load_state_dict(below(f"{name}/w/", weights))
    with torch.no_grad():
        found = module(*below(f"{name}/in/", tensors).values())
    assert_close(found, tensors[f"{name}/out/y"], meta["tolerance"])


@pytest.mark.parametrize("name", [name for name in LISTINGS if name.split("-")[0] in FAMILIES])
def test_public_checkpoint_fits_strictly(name):
    listing = LISTINGS[name]
    unet = listing["components"]["unet"]
    with torch.device("meta"):
        net = build_network(FAMILIES[name.split("-")[0]], **listing["hyperparameters"]["unet"])
        state = {key: torch.empty(shape) for key, shape in unet["shapes"].items()}
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state, strict=True, assign=True)
    assert sum(p.numel() for p in net.parameters()) == unet["parameters"]


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name):
    """Every layer and operand has a role and runs, every product is a module, the kept halves add
    up, gradients reach all."""
    net, (x, t), cond = tiny(**OPTIONS[name]), inputs(), condition(OPTIONS[name])
    ran = []
    for path, module in net.named_modules():
        if isinstance(module, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Linear, Operand)):
            assert module.role
            module.register_forward_hook(lambda _, __, out, path=path: ran.append(path))
    out = net(x, t, cond)
    assert out.shape == x.shape and len(ran) == len(set(ran)) == sum(
        hasattr(m, "role") for m in net.modules()
    )
    for stage in net.output_blocks:
        skip = stage[0].skip_connection
        assert isinstance(skip, torch.nn.Identity) or sum(skip.input_splits) == skip.in_channels
    attentions = sum(isinstance(m, (QKVAttention, CrossAttention)) for m in net.modules())
    assert sum(isinstance(m, Matmul) for m in net.modules()) == 2 * attentions > 0
    out.square().sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_image_does_not_depend_on_its_batch(name):
    net, (x, t), cond = tiny(**OPTIONS[name]), inputs(), condition(OPTIONS[name])
    first = (
        tuple(c[:1] for c in cond)
        if isinstance(cond, tuple)
        else None
        if cond is None
        else cond[:1]
    )
    with torch.no_grad():
        assert_close(net(x[:1], t[:1], first), net(x, t, cond)[:1], 1e-5)


@pytest.mark.parametrize(
    "options, counts",
    [
        ({}, ([4, 4], [4], [4, 4, 4, 4])),
        ({"num_heads_upsample": 8}, ([4, 4], [4], [8, 8, 8, 8])),
        ({"num_heads_upsample": 8, "legacy": False}, ([4, 4], [4], [4, 4, 4, 4])),
        ({"num_head_channels": 16}, ([2, 4], [4], [4, 4, 2, 2])),
    ],
)
def test_heads(options, counts):
    net = tiny(**{"attention_resolutions": [1, 2], "num_heads": 4} | options)
    for part, expected in zip((net.input_blocks, net.middle_block, net.output_blocks), counts):
        assert [m.num_heads for m in part.modules() if isinstance(m, QKVAttention)] == expected


@pytest.mark.parametrize("family", ["improved-unet", "guided-unet"])
def test_one_head_unless_told_otherwise(family):
    net = build_network(family, **{key: value for key, value in TINY.items() if key != "num_heads"})
    assert net.middle_block[1].attention.num_heads == 1


@pytest.mark.parametrize("legacy, width", [(True, 64), (False, 48)])
def test_heads_that_do_not_fill_a_level(legacy, width):
    """64 channels have room for two heads of 24: `legacy` makes them 32 wide."""
    net = tiny(use_spatial_transformer=True, context_dim=24, num_head_channels=24, legacy=legacy)
    transformer = net.middle_block[1]
    assert isinstance(transformer, SpatialTransformer) and transformer.proj_in.out_channels == width
    assert net(*inputs(), CONTEXT).shape == (2, 3, 8, 8)


def test_both_orders_of_qkv_load_the_same_weights_and_differ():
    old, new = tiny("guided-unet"), tiny("guided-unet", use_new_attention_order=True)
    new.load_state_dict(old.state_dict())
    with torch.no_grad():
        assert not torch.allclose(old(*inputs()), new(*inputs()), atol=1e-3)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"num_heads": -1}, "'num_heads' or 'num_head_channels'"),
        ({"num_heads": 3}, "64 channels cannot be split evenly"),
        ({"num_head_channels": 24}, "into heads of 24"),
        ({"context_dim": 24}, "'use_spatial_transformer: true'"),
        ({"attention_resolutions": None}, "'attention_downsampling_factors'"),
        ({"attention_downsampling_factors": [2]}, "one of them"),
    ],
)
def test_impossible_options_are_refused(options, expected):
    with pytest.raises(ValueError, match=expected):
        build_network("ldm-unet", **TINY | options)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 5, "use_scale_shift_norm": True},
        {"use_spatial_transformer": True, "context_dim": 24},
    ],
)
def test_half_precision_trunk(options):
    net, cond = tiny(**options), condition(options)
    half = build_network("guided-unet", **TINY | options, use_fp16=True).eval()
    half.load_state_dict(net.state_dict())
    assert half.middle_block[0].in_layers[2].weight.dtype == torch.float16
    assert {
        half.time_embed[0].weight.dtype,
        half.out[2].weight.dtype,
        half.out[0].weight.dtype,
        half.middle_block[0].in_layers[0].weight.dtype,
    } == {torch.float32}
    seen = {}
    for path, module in half.named_modules():
        module.register_forward_hook(
            lambda _, __, out, path=path: seen.__setitem__(path, out.dtype)
        )
    with torch.no_grad():
        found, expected = half(*inputs(), cond), net(*inputs(), cond)
    assert (
        found.dtype == seen["time_embed"] == torch.float32 and seen["middle_block"] == torch.float16
    )
    assert_close(found, expected, 1e-2)
    assert not torch.equal(found, expected)


def test_units_take_positional_tensors():
    net, seen = tiny(**OPTIONS["transformer"], num_head_channels=16), {}
    for module in net.modules():
        if isinstance(module, (ResBlock, AttentionBlock, SpatialTransformer)):
            module.register_forward_hook(
                lambda m, args, kwargs, out: seen.setdefault(type(m), []).append((args, kwargs)),
                with_kwargs=True,
            )
    net(*inputs(), CONTEXT)
    assert set(seen) == {ResBlock, SpatialTransformer}
    for args, kwargs in sum(seen.values(), []):
        assert not kwargs and len(args) == 2 and all(isinstance(a, torch.Tensor) for a in args)

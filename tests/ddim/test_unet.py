"""The DDIM U-Net and its parts give the recorded numbers and have the names and shapes of the
public checkpoints."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CHECKPOINTS, assert_close, below, read_fixture

from ddim.unet import AttnBlock, Downsample, ResnetBlock, UNet, Upsample


def test_network_and_every_stage_give_the_recorded_values():
    meta, weights, tensors = read_fixture("ddim_unet")
    options = {k: v for k, v in meta["config"]["model"].items() if k != "type"}
    net = UNet(image_size=meta["config"]["data"]["image_size"], **options).eval()
    net.load_state_dict(below("unet/", weights))
    seen = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _, __, out, name=name: seen.__setitem__(name, out))
    with torch.no_grad():
        eps = net(tensors["in/x"], tensors["in/t"])
    assert_close(eps, tensors["out/eps"], meta["tolerance"])
    taps = below("tap/", tensors)
    assert len(taps) == 22
    for name, expected in taps.items():
        found = seen[name][:1]
        # this norm includes the activation behind it
        expected = F.silu(expected.float()) if name == "norm_out" else expected
        if found.dim() == 4 and found.shape[3] >= 16:
            found = found[..., ::2, ::2]
        assert_close(found, expected, 1e-3)  # taps are recorded in half precision


PRIMITIVES = {
    "down_asymmetric": lambda: Downsample(32, True),
    "up_nearest_conv": lambda: Upsample(32, True),
    "resnet_block": lambda: ResnetBlock(32, 64, 48, 0.0, 32),
    "attn_block_1head": lambda: AttnBlock(32, 32),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_part_gives_the_recorded_values(name):
    meta, weights, tensors = read_fixture("primitives")
    module = PRIMITIVES[name]().eval()
    module.load_state_dict(below(f"{name}/w/", weights))
    inputs = below(f"{name}/in/", tensors)
    with torch.no_grad():
        assert_close(module(*inputs.values()), tensors[f"{name}/out/y"], meta["tolerance"])


def test_attention_equals_the_fused_one():
    torch.manual_seed(0)
    block, x = AttnBlock(8, 4).requires_grad_(False), torch.randn(2, 8, 3, 5)
    q, k, v = (
        layer(block.norm(x)).flatten(2).transpose(1, 2) for layer in (block.q, block.k, block.v)
    )
    expected = x + block.proj_out(
        F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 8, 3, 5)
    )
    assert_close(block(x), expected, 1e-6)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_public_checkpoint_fits_strictly(name):
    listing = CHECKPOINTS[name]
    with torch.device("meta"):
        net = UNet(**listing["network"])
        state = {key: torch.empty(shape) for key, shape in listing["shapes"].items()}
    assert list(net.state_dict()) == list(state)
    net.load_state_dict(state, strict=True, assign=True)
    assert sum(p.numel() for p in net.parameters()) == listing["parameters"]


def test_every_layer_has_a_role_and_concatenations_know_their_halves(tiny_net):
    layers = {
        name: module
        for name, module in tiny_net.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear))
    }
    assert all(hasattr(layer, "role") for layer in layers.values())
    for level in tiny_net.up:
        for block in level.block:
            assert sum(block.nin_shortcut.input_splits) == block.nin_shortcut.in_channels


def test_options_without_parameters():
    net = UNet(
        image_size=8,
        ch=8,
        ch_mult=(1, 2),
        num_res_blocks=1,
        attn_resolutions=(),
        resamp_with_conv=False,
        norm_groups=4,
    )
    assert not any("sample.conv" in name for name in net.state_dict())
    assert net(torch.zeros(1, 3, 8, 8), torch.zeros(1)).shape == (1, 3, 8, 8)

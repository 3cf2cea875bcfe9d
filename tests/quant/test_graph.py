"""The graph of a network: execution order, closed forms of its cost, who reads whose output."""

import itertools

import torch
from tiny import EXAMPLE, SHAPE, Wired, normal
from torch import nn

from models.zoo import build_network
from quant.graph import trace

UNITS = [
    "temb.dense.0",
    "temb.dense.1",
    "conv_in",
    "down.0.block.0",
    "down.0.downsample.conv",
    "down.1.block.0",
    "down.1.attn.0",
    "mid.block_1",
    "mid.attn_1",
    "mid.block_2",
    "up.1.block.0",
    "up.1.attn.0",
    "up.1.block.1",
    "up.1.attn.1",
    "up.1.upsample.conv",
    "up.0.block.0",
    "up.0.block.1",
    "conv_out",
]
T = torch.tensor([500.0])


def test_units_come_in_execution_order(tiny_net):
    assert trace(tiny_net, EXAMPLE).units == UNITS


def test_order_is_that_of_a_real_forward_pass(tiny_net):
    ran, macs = [], trace(tiny_net, EXAMPLE).macs
    for name in macs:
        tiny_net.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    tiny_net(normal(1, *SHAPE), T[:1])
    assert list(macs) == ran
    assert set(ran) == {
        n
        for n, m in tiny_net.named_modules()
        if isinstance(m, (nn.Linear, nn.Conv2d)) or n.endswith("matmul")
    }


def test_multiply_adds_closed_form(tiny_net):
    macs = trace(tiny_net, EXAMPLE).macs
    assert macs["temb.dense.0"] == 8 * 32
    assert macs["conv_in"] == 8 * 8 * 8 * (3 * 3 * 3)
    assert macs["down.0.downsample.conv"] == 8 * 4 * 4 * (8 * 3 * 3)
    assert macs["up.0.block.0.nin_shortcut"] == 8 * 8 * 8 * 24
    assert macs["mid.attn_1.qk_matmul"] == 16 * 16 * 16  # L x L scores of C products each
    assert macs["mid.attn_1.av_matmul"] == 16 * 16 * 16
    assert all(type(m) is int for m in macs.values())
    assert not any(p.is_meta for p in tiny_net.parameters())


def test_public_architecture_has_38_units():
    """CIFAR-10 (methods of Q-Diffusion count 38), traced without computing."""
    with torch.device("meta"):
        net = build_network("ddim-unet", image_size=32)
    units = trace(net, (torch.empty(1, 3, 32, 32), torch.zeros(1))).units
    assert len(units) == 38 and units[2] == "conv_in" and units[-1] == "conv_out"
    levels = [u[:4] for u in units if u.startswith("up.")]
    assert levels == sorted(levels, reverse=True) and levels[0] == "up.3"


def test_last_uses_of_a_known_graph():
    graph = trace(Wired(), (normal(1, 3), torch.zeros(1)))
    assert graph.units == list("abcde") and graph.last_use == {
        "a": 3,
        "b": 4,
        "c": 3,
        "d": 3,
        "e": 4,
    }
    assert set(graph.outputs.values()) == {3} and set(graph.macs.values()) == {9}


def test_readers_of_a_known_graph():
    graph = trace(Wired(), (normal(1, 3), torch.zeros(1)))
    assert graph.reads == {"a": [], "b": ["a"], "c": ["b"], "d": ["a", "c"], "e": ["b"]}
    assert graph.readers == {"a": [1, 3], "b": [2, 4], "c": [3], "d": [], "e": []}
    own = {unit: source for unit in "abcde" for _, source in graph.arguments[unit]}
    # b is read behind a ReLU, and a + c is nobody's output
    assert own == {"a": None, "b": "a", "c": None, "d": None, "e": None}
    assert graph.work == dict.fromkeys("abcde", 9)


def test_way_to_a_unit_of_a_known_graph():
    graph = trace(Wired(), (normal(1, 3), torch.zeros(1)))
    assert graph.way_to("d", {"a", "b", "c"}) == ({"a", "c"}, set())
    assert graph.way_to("d", {"b", "c"}) == ({"c"}, {"a"})
    assert graph.way_to("d", {"b"}) == ({"b"}, {"a", "c"})
    assert graph.way_to("d", {"a"}) == ({"a"}, {"c", "b"})
    assert graph.way_to("e", set()) == (set(), {"a", "b"})
    assert graph.way_to("a", set()) == (set(), set())


def test_skips_of_the_u_net_live_until_the_way_up(tiny_net):
    graph = trace(tiny_net, EXAMPLE)
    reader = {unit: graph.units[index] for unit, index in graph.last_use.items()}
    assert reader["conv_in"] == "up.0.block.1" and reader["down.0.block.0"] == "up.0.block.0"
    assert (
        reader["down.0.downsample.conv"] == "up.1.block.1"
        and reader["down.1.attn.0"] == "up.1.block.0"
    )
    assert reader["temb.dense.1"] == "up.0.block.1" and reader["temb.dense.0"] == "temb.dense.1"
    for unit, following in itertools.pairwise(
        ["mid.block_1", "mid.attn_1", "mid.block_2", "up.1.block.0"]
    ):
        assert reader[unit] == following


def test_condition_is_no_captured_input():
    """A context reaches the transformer blocks as it is; what they read of the network is their
    tokens."""
    torch.manual_seed(0)
    net = build_network(
        "ldm-unet",
        in_channels=3,
        out_channels=3,
        model_channels=32,
        attention_resolutions=[1],
        num_res_blocks=1,
        channel_mult=[1],
        num_heads=2,
        use_spatial_transformer=True,
        context_dim=5,
    )
    graph = trace(net, (torch.empty(1, 3, 8, 8), torch.zeros(1), torch.empty(1, 7, 5)))
    blocks = [unit for unit in graph.units if "transformer_blocks" in unit]
    assert len(blocks) == 4 and {graph.outputs[unit] for unit in blocks} == {32 * 64}
    assert all([size for size, _ in graph.arguments[unit]] == [32 * 64] for unit in blocks)
    assert graph.macs[f"{blocks[0]}.attn2.to_k"] == 7 * 5 * 32
    for unit in blocks:
        assert graph.units[graph.last_use[unit]] == unit.replace("transformer_blocks.0", "proj_out")

"""The attention of the U-Nets in ldm/ gives the recorded numbers and computes what its names
say."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, below, randomize, read_fixture

from base.network import Matmul
from ldm.attention import (
    AttentionBlock,
    BasicTransformerBlock,
    CrossAttention,
    FeedForward,
    QKVAttention,
    SpatialTransformer,
)

PRIMITIVES = {
    "attention_legacy": lambda: QKVAttention(4, False),
    "attention_new": lambda: QKVAttention(4, True),
    "cross_attention": lambda: CrossAttention(32, 24, 4, 8),
    "geglu_feed_forward": lambda: FeedForward(32),
    "transformer_block": lambda: BasicTransformerBlock(32, 24, 4, 8),
    "spatial_transformer": lambda: SpatialTransformer(32, 4, 8, 1, 24),
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_part_gives_the_recorded_values(name):
    meta, weights, tensors = read_fixture("primitives")
    module = PRIMITIVES[name]().eval()
    module.load_state_dict(below(f"{name}/w/", weights))
    with torch.no_grad():
        found = module(*below(f"{name}/in/", tensors).values())
    assert_close(found, tensors[f"{name}/out/y"], meta["tolerance"])


@pytest.mark.parametrize("new_order", [False, True])
def test_fused_attention_equals_that_of_torch(new_order):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 8, 10)  # (N, heads, D, L) each
    axis = 1 if new_order else 2
    found = QKVAttention(4, new_order)(torch.stack([q, k, v], dim=axis).reshape(2, 96, 10))
    expected = F.scaled_dot_product_attention(*(a.transpose(2, 3) for a in (q, k, v)))
    assert_close(found, expected.transpose(2, 3).reshape(2, 32, 10), 1e-6)


@pytest.mark.parametrize("new_order", [False, True])
def test_order_of_heads_is_that_of_the_rows(new_order):
    torch.manual_seed(0)
    qkv, heads = torch.randn(2, 96, 10), torch.tensor([2, 0, 3, 1])
    attention = QKVAttention(4, new_order)
    shape = (2, 3, 4, 8, 10) if new_order else (2, 4, 3, 8, 10)
    permuted = qkv.reshape(shape).index_select(2 if new_order else 1, heads).reshape(qkv.shape)
    expected = attention(qkv).reshape(2, 4, 8, 10)[:, heads].reshape(2, 32, 10)
    assert_close(attention(permuted), expected, 1e-6)
    assert not torch.allclose(attention(qkv), QKVAttention(4, not new_order)(qkv), atol=0.1)


def test_one_head_has_one_order():
    qkv = torch.randn(2, 96, 10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(QKVAttention(1, False)(qkv), QKVAttention(1, True)(qkv))


def test_cross_attention_without_context_attends_to_its_input():
    torch.manual_seed(0)
    attention, x = CrossAttention(12, None, 3, 5), torch.randn(2, 7, 12)
    assert torch.equal(attention(x), attention(x, x))
    assert attention(x, torch.randn(2, 4, 12)).shape == x.shape


def test_context_tokens_have_no_order():
    torch.manual_seed(0)
    block, x, context = (
        BasicTransformerBlock(16, 6, 2, 8),
        torch.randn(2, 9, 16),
        torch.randn(2, 5, 6),
    )
    block.requires_grad_(False)
    assert_close(block(x, context.flip(1)), block(x, context), 1e-6)


# how to build it, shapes of its inputs
MODULES = {
    "fused": (lambda: AttentionBlock(32, 4), (2, 32, 3, 5)),
    "cross": (lambda: CrossAttention(32, 6, 4, 8), (2, 15, 32), (2, 7, 6)),
    "spatial": (lambda: SpatialTransformer(32, 4, 8, 2, 6), (2, 32, 3, 5), (2, 7, 6)),
}


def products(module):
    return [m for m in module.modules() if isinstance(m, Matmul)]


@pytest.mark.parametrize("name", MODULES)
def test_products_are_modules_with_their_heads_on_axis_1(name):
    make, *shapes = MODULES[name]
    module, operands = randomize(make()), []
    for product in products(module):
        assert product.num_heads == 4
        product.register_forward_pre_hook(
            lambda product, pair: operands.extend(zip(product.roles, pair))
        )
    module(*(torch.randn(shape) for shape in shapes))
    attentions = sum(isinstance(m, (QKVAttention, CrossAttention)) for m in module.modules())
    assert sorted(role for role, _ in operands) == sorted(["q", "k", "v", "probs"] * attentions)
    assert all(values.dim() == 4 and values.shape[:2] == (2, 4) for _, values in operands)


@pytest.mark.parametrize("name", MODULES)
@torch.no_grad()
def test_only_the_products_carry_values_to_the_output(name):
    """With the products of values silenced, q, k and v do not matter."""
    make, *shapes = MODULES[name]
    module, inputs = randomize(make()), [torch.randn(shape) for shape in shapes]
    loud = module(*inputs)
    for product in products(module):
        if "v" in product.roles:
            product.register_forward_hook(lambda _, pair, out: torch.zeros_like(out))
    silent = module(*inputs)
    for layer in module.modules():
        if getattr(layer, "role", "") in ("q", "k", "v", "qkv"):
            layer.weight.add_(1)
    assert torch.equal(module(*inputs), silent) and not torch.equal(silent, loud)


@pytest.mark.parametrize("name", MODULES)
def test_gradients_reach_inputs_and_weights(name):
    make, *shapes = MODULES[name]
    module = randomize(make())
    inputs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(1), requires_grad=True)
        for shape in shapes
    ]
    module(*inputs).square().sum().backward()
    assert all(
        a.grad is not None and a.grad.abs().max() > 0 for a in (*inputs, *module.parameters())
    )

"""Bit operations of a network."""

from typing import Any


def bit_operations(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Bit operations of one image and run of the network (guidance takes two a step) from the
    layers of map.json -> {"float", "quantized"}: the sum over layers and attention products of
    multiply-adds x bits of one operand x bits of the other (`bit_product`; where widths differ by
    time, its mean over the sampler's steps), 32 x 32 in full precision."""
    return {
        "float": sum(row["macs"] for row in layers) * 32 * 32,
        "quantized": sum(row["macs"] * row["bit_product"] for row in layers),
    }

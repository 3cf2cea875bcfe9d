"""Bit operations, counted by hand."""

from evaluation.scores.cost import bit_operations


def test_bit_operations_by_hand():
    """10 multiply-adds of 4 x 8 bits, 3 of 8 x 16, 2 left alone."""
    layers = [
        {"bit_product": 32, "macs": 10},
        {"bit_product": 128, "macs": 3},
        {"bit_product": 1024, "macs": 2},
    ]
    assert bit_operations(layers) == {"float": 15 * 1024, "quantized": 10 * 32 + 3 * 128 + 2 * 1024}

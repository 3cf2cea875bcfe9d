"""Random numbers that depend on a seed and an index alone."""

import torch


class SeededNoise:
    """One random stream per image: image i draws from (seed, i) whatever the batch, the order or
    the machine.

    `draw()` gives (N, *shape) float32, always generated on the CPU, then moved to `device`.
    """

    def __init__(self, seed, indices, shape, device="cpu"):
        # SplitMix64 of the pair: neighbouring images get unrelated streams.
        self.generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        self.shape, self.device = tuple(shape), device

    def draw(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(
            self.device
        )


def mix(seed, index):
    """A 63-bit seed for the pair."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) % 2**63

"""Random numbers that depend on a seed and an index alone."""

from collections.abc import Iterable, Sequence

import torch

from base.devices import Device


class SeededNoise:
    """One random stream per image: image i draws from (seed, i) whatever the batch, the order or
    the machine. `draw()` gives the next (N, *shape) float32, always generated on the CPU, then
    moved to `device`."""

    def __init__(
        self, seed: int, indices: Iterable[int], shape: Sequence[int], device: Device = "cpu"
    ) -> None:
        # SplitMix64 of the pair: neighbouring images get unrelated streams.
        self.generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        self.shape, self.device = tuple(shape), device

    def draw(self) -> torch.Tensor:
        noise = [torch.randn(self.shape, generator=generator) for generator in self.generators]
        return torch.stack(noise).to(self.device)


def mix(seed: int, index: int) -> int:
    """Hashes the pair to a 63-bit seed."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) % 2**63

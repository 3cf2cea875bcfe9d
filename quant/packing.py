"""Integer codes packed to their real width, least significant bit first (4 bit: two per byte)."""

from collections.abc import Sequence

import numpy as np
import torch

CHUNK = 2**20  # codes unpacked at a time (a multiple of 8)


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes in 0..2^bits-1, any shape -> uint8 (ceil(count * bits / 8),)."""
    flat = codes.flatten().to(torch.uint8).cpu().numpy()
    places = np.arange(bits, dtype=np.uint8)
    pieces = [
        np.packbits((flat[i : i + CHUNK, None] >> places) & 1, bitorder="little")
        for i in range(0, len(flat), CHUNK)
    ]
    return torch.from_numpy(np.concatenate(pieces))


def unpack(packed: torch.Tensor, bits: int, shape: Sequence[int]) -> torch.Tensor:
    """Inverse of `pack` -> uint8 tensor of `shape`."""
    count, data = int(torch.Size(shape).numel()), packed.numpy()
    out = np.empty(count, dtype=np.uint8)
    for i in range(0, count, CHUNK):
        size = min(CHUNK, count - i)
        spread = np.unpackbits(data[i * bits // 8 :], count=size * bits, bitorder="little")
        spread = spread.reshape(size, bits)
        out[i : i + size] = (spread << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.uint8)
    return torch.from_numpy(out).reshape(shape)

"""The integer convolution of the CUDA engine: one Triton kernel, an implicit matrix product.

    out[m, o] = float32(sum_k (code[m, k] - z) * w[o, k]) * scale[o] + bias[o] (+ residual[m, o])

m runs over the pixels of the result, k over kernel taps times channels. Tensor cores multiply
signed bytes: a code less 128 is the code with its highest bit turned, and (128 - z) * sum_k w[o, k]
is added to the sum, which is exact in int32. A tap that lies in the padding reads a row of bytes
that all hold z and so adds nothing: bytes need no select on their way, and z may be a number that
only the GPU knows. Product, bias and residual are rounded one after the other, never fused."""

from math import ceil, gcd
from typing import NamedTuple

import torch
import triton
import triton.language as tl

BORDER = 64  # bytes in a row of the border table: the largest block of channels


class Tile(NamedTuple):
    """What one program computes. `speed` compares the rates of full tiles; it is an estimate from
    how often each loads an operand, not measured."""

    rows: int
    outputs: int
    warps: int
    stages: int
    speed: float


TILES = (
    Tile(128, 256, 8, 3, 1.0),
    Tile(128, 128, 8, 4, 0.85),
    Tile(128, 64, 4, 4, 0.65),
    Tile(64, 64, 4, 4, 0.5),
    Tile(64, 32, 4, 4, 0.35),
)


def choose_tile(rows: int, outputs: int, processors: int) -> Tile:
    """The tile with which a result of `rows` pixels and `outputs` channels is done first, each of
    the GPU's processors taking one tile after the other."""

    def time(tile):
        tiles = ceil(rows / tile.rows) * ceil(outputs / tile.outputs)
        return ceil(tiles / processors) * tile.rows * tile.outputs / tile.speed

    return min(TILES, key=time)


class Geometry(NamedTuple):
    """Sizes of one convolution, in the order in which the kernel takes them."""

    out_height: int
    out_width: int
    height: int
    width: int
    channels: int
    stride_y: int
    stride_x: int
    top: int
    left: int
    dilation_y: int
    dilation_x: int


SIZES = ["rows", "out_height", "out_width", "height", "width"]  # compiled once for all of them


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["zero_point"])
def _convolve(
    codes,
    borders,
    weight,
    sums,
    zero_point,
    scale,
    bias,
    residual,
    out,
    rows,
    outputs,
    depth,
    out_height,
    out_width,
    height,
    width,
    channels,
    stride_y,
    stride_x,
    top,
    left,
    dilation_y,
    dilation_x,
    KERNEL_Y: tl.constexpr,
    KERNEL_X: tl.constexpr,
    PADDED: tl.constexpr,
    ALIGNED: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BORDER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of the result. `codes` (N, height, width, channels), `borders` (256, BORDER),
    `weight` (outputs, taps * depth), depth being channels rounded up, and its `sums` (outputs,)."""
    # neighbouring programs share their rows: weights are few and stay in the cache
    blocks = tl.cdiv(outputs, BLOCK_N)
    m = tl.program_id(0) // blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    row = tl.minimum(m, rows - 1)
    first_y = row // out_width % out_height * stride_y - top
    first_x = row % out_width * stride_x - left
    images = codes + (row // (out_height * out_width)).to(tl.int64) * height * width * channels
    weights = weight + (o % outputs).to(tl.int64)[None, :] * (KERNEL_Y * KERNEL_X * depth)
    weights += k[:, None]
    z = tl.load(zero_point)
    border = borders + z * BORDER
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    tap_y = 0
    tap_x = 0
    c = 0
    for _ in range(KERNEL_Y * KERNEL_X * (depth // BLOCK_K)):
        y = first_y + tap_y * dilation_y
        x = first_x + tap_x * dilation_x
        pixel = images + (y * width + x) * channels + c
        if PADDED:
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            pixel = tl.where(inside, pixel, border)
        # Triton loses sight of the alignment at `where`, and with it asynchronous copies
        pixel = tl.multiple_of(pixel, ALIGNED)
        a = tl.load(pixel[:, None] + k[None, :], mask=(k < channels - c)[None, :], other=0)
        if PACKED:
            # Four bytes at once, which Triton does not see by itself on Ampere. The second operand
            # keeps its prefetching away, which carries single bytes from step to step.
            high = tl.full((BLOCK_M, BLOCK_K), -128, tl.int8)
            a = tl.inline_asm_elementwise(
                "xor.b32 $0, $1, $2;", "=r,r,r", [a, high], dtype=tl.int8, is_pure=True, pack=4
            )
        else:
            a = a ^ -128
        total = tl.dot(a, tl.load(weights), total, out_dtype=tl.int32)
        weights += BLOCK_K
        c += BLOCK_K
        tap_x += (c == depth).to(tl.int32)
        c = tl.where(c == depth, 0, c)
        tap_y += (tap_x == KERNEL_X).to(tl.int32)
        tap_x = tl.where(tap_x == KERNEL_X, 0, tap_x)
    known = o < outputs
    total += (128 - z) * tl.load(sums + o, mask=known, other=0)[None, :]
    result = total.to(tl.float32) * tl.load(scale + o, mask=known, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + o, mask=known, other=0.0)[None, :]
    at = m.to(tl.int64)[:, None] * outputs + o[None, :]
    mask = (m < rows)[:, None] & known[None, :]
    if HAS_RESIDUAL:
        result += tl.load(residual + at, mask=mask, other=0.0)
    tl.store(out + at, result, mask=mask)


# the interpreter knows no assembler, and that of AMD is another one
PACKED = isinstance(_convolve, triton.JITFunction) and torch.version.cuda is not None


def block_of(channels: int) -> int:
    """Channels that are multiplied at a time; a tap's are padded to a multiple."""
    return 32 if channels <= 32 else BORDER


def launch(
    codes: torch.Tensor,
    borders: torch.Tensor,
    weight: torch.Tensor,
    sums: torch.Tensor,
    zero_point: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    out: torch.Tensor,
    kernel: tuple[int, int],
    geometry: Geometry,
    tile: Tile,
) -> None:
    """Fill `out` (rows, outputs) float32. Bytes (`codes`, `borders`, `weight`) are int8 views;
    everything is contiguous and on one device."""
    rows, outputs = out.shape
    block = block_of(geometry.channels)
    flags = {
        "PADDED": bool(geometry.top or geometry.left),
        # memory is allocated at multiples of 16 bytes and more
        "ALIGNED": gcd(codes.storage_offset(), geometry.channels, 16),
        "PACKED": PACKED,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "BORDER": BORDER,
    }
    blocks = {"BLOCK_M": tile.rows, "BLOCK_N": tile.outputs, "BLOCK_K": block}
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": False}
    unused = out  # a pointer that is never followed
    with torch.cuda.device_of(out):  # Triton launches on the current device
        _convolve[(ceil(rows / tile.rows) * ceil(outputs / tile.outputs),)](
            codes,
            borders,
            weight,
            sums,
            zero_point,
            scale,
            unused if bias is None else bias,
            unused if residual is None else residual,
            out,
            rows,
            outputs,
            weight.shape[1] // (kernel[0] * kernel[1]),
            *geometry,
            KERNEL_Y=kernel[0],
            KERNEL_X=kernel[1],
            **flags,
            **blocks,
            **options,
        )

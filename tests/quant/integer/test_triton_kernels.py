"""The integer convolution against its definition in int64: in Triton's interpreter, and as the code
that Triton makes of it for a GPU."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton", reason="comes with PyTorch for CUDA")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from base.files import PROJECT  # noqa: E402
from quant.integer import triton_kernels  # noqa: E402
from quant.integer.cuda import CudaEngine  # noqa: E402
from quant.integer.triton_kernels import TILES, _convolve, choose_tile  # noqa: E402

NAMES = _convolve.arg_names

# the interpreter is chosen when a kernel is defined, so it needs a process of its own
INTERPRET = """
import sys, torch
from quant.integer.cuda import CudaEngine, self_test

engine, found = CudaEngine("cpu"), {"self-test": self_test("cpu")}
for name, (processors, weight, how, arguments) in torch.load(sys.argv[1]).items():
    engine.processors = processors
    product = engine.linear(weight) if how is None else engine.conv(weight, *how)
    found[name] = product(*arguments)
torch.save(found, sys.argv[2])
"""
PLAIN = (1, 1), (1, 1), (1, 1)


def case(shape, outputs, kernel, how, zero_point, *, processors=1, residual=False, seed=0):
    """Random codes (N, C, H, W) or (..., C) and weights, with both extremes; a convolution unless
    `how` is None."""
    rng = torch.Generator().manual_seed(seed)
    channels = shape[1] if how else shape[-1]
    codes = torch.randint(0, 256, shape, generator=rng).to(torch.uint8)
    codes[0] = 255
    weight = torch.randint(-128, 128, (outputs, channels, *kernel), generator=rng).to(torch.int8)
    weight[::2] = -128
    scale, bias = torch.randn(2, outputs, generator=rng)
    arguments = [codes, zero_point, scale, bias]
    expected = definition(codes, weight, how, int(zero_point), scale, bias)
    if residual:
        arguments.append(torch.randn(expected.shape, generator=rng))
        expected = expected + arguments[-1]
    return (processors, weight, how, arguments), expected


def definition(codes, weight, how, zero_point, scale, bias):
    """(sum (code - zero point) * weight) * scale + bias, its sum in int64."""
    integers, weight = codes.long() - zero_point, weight.long()
    if how is None:
        return (integers @ weight.T).float() * scale + bias
    (sy, sx), (py, px), (dy, dx) = how
    integers, (kh, kw) = F.pad(integers, (px, px, py, py)), weight.shape[2:]
    height, width = integers.shape[2] - dy * (kh - 1), integers.shape[3] - dx * (kw - 1)
    total = 0
    for y in range(kh):
        for x in range(kw):
            window = integers[:, :, y * dy : y * dy + height : sy, x * dx : x * dx + width : sx]
            total = total + torch.einsum("nchw,oc->nohw", window, weight[:, :, y, x])
    return total.float() * scale[:, None, None] + bias[:, None, None]


def channels_last(made):
    made[0][3][0] = made[0][3][0].contiguous(memory_format=torch.channels_last)
    return made


def without_bias(made):
    (processors, weight, how, (codes, zero_point, scale, _)), _ = made
    expected = definition(codes, weight, how, zero_point, scale, torch.zeros(len(weight)))
    return (processors, weight, how, [codes, zero_point, scale, None]), expected


def unaligned(made):
    """The codes begin at an odd address."""
    codes = made[0][3][0]
    memory = torch.empty(codes.numel() + 1, dtype=torch.uint8)[1:]
    made[0][3][0] = memory.view(codes.shape).copy_(codes)
    return made


TENSOR = torch.tensor(77, dtype=torch.int32)
CASES = {
    **{f"zero point {z}": case((2, 5, 6, 7), 9, (3, 3), PLAIN, z) for z in (0, 7, 128, 255)},
    "zero point in a tensor": case((2, 5, 6, 7), 9, (3, 3), PLAIN, TENSOR),
    "channels_last": channels_last(case((2, 16, 6, 7), 9, (3, 3), PLAIN, 9)),
    "residual": case((2, 5, 6, 7), 9, (3, 3), PLAIN, 99, residual=True),
    "no bias": without_bias(case((2, 5, 6, 7), 9, (3, 3), PLAIN, 99)),
    "stride": case((2, 33, 9, 8), 5, (3, 3), ((2, 2), (1, 1), (1, 1)), 200),
    "uneven stride": case((1, 3, 9, 8), 5, (3, 2), ((2, 3), (0, 1), (1, 1)), 200),
    "dilation": case((2, 3, 9, 8), 5, (3, 3), ((1, 1), (2, 3), (2, 3)), 31),
    "more padding than map": case((1, 3, 2, 1), 5, (3, 3), ((1, 1), (4, 5), (1, 1)), 31),
    "1x1": case((2, 70, 5, 5), 33, (1, 1), ((1, 1), (0, 0), (1, 1)), 31),
    "one row": case((3, 12, 1, 10), 7, (1, 3), ((1, 1), (0, 1), (1, 1)), 31),
    "one output": case((2, 64, 5, 5), 1, (3, 3), PLAIN, 255),
    "sums beyond 2^24": case((1, 128, 3, 3), 6, (3, 3), PLAIN, 0),
    "linear": case((5, 40), 130, (), None, 3),
    "linear over tokens": unaligned(case((2, 3, 48), 20, (), None, 255, residual=True)),
    "many processors": case((3, 64, 8, 8), 40, (3, 3), PLAIN, 5, processors=100),
    **{
        f"tile {tile.rows} x {tile.outputs}": case(
            (2, 65, 8, tile.rows // 16), tile.outputs, (3, 3), PLAIN, 13
        )
        for tile in TILES
    },
}


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """Name of the case -> what the kernel gives in the interpreter."""
    if triton.__version__ < "3.7" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("the interpreter of Triton 3.6 cannot loop with NumPy 2.4 or newer")
    given, found = (tmp_path_factory.mktemp("kernel") / name for name in ("given", "found"))
    torch.save({name: made[0] for name, made in CASES.items()}, given)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", INTERPRET, given, found]
    subprocess.run(command, env=environment, check=True, cwd=PROJECT)
    return torch.load(found)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_integer_arithmetic_bit_for_bit(name, interpreted):
    expected = CASES[name][1]
    assert interpreted[name].dtype == torch.float32
    assert torch.equal(interpreted[name], expected)
    if expected.dim() == 4:
        assert interpreted[name].is_contiguous(memory_format=torch.channels_last)


def test_the_self_test_passes_in_the_interpreter(interpreted):
    assert interpreted["self-test"] == ""


def test_the_tile_is_what_ends_first():
    assert choose_tile(128, 256, 1) == choose_tile(10**6, 512, 132) == TILES[0]
    assert choose_tile(10**6, 128, 132) == TILES[1]  # half of a larger one would be empty
    assert choose_tile(10**6, 3, 132) == TILES[-1]
    assert choose_tile(256, 512, 132) == TILES[-1]  # of larger ones there are fewer than processors
    for tile in TILES:
        assert choose_tile(tile.rows, tile.outputs, 1) == tile


@pytest.fixture
def launched(monkeypatch):
    """-> shape of the codes, weight, how -> the kernel's arguments and options by name, on tensors
    that hold nothing."""
    kept = {}

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **named: kept.update(zip(NAMES, args), grid=grid, **named)

    monkeypatch.setattr(triton_kernels, "_convolve", Kernel())
    monkeypatch.setattr(triton_kernels, "PACKED", True)  # as with a GPU

    def launch(codes, outputs, kernel=(3, 3), how=PLAIN):
        engine = CudaEngine("meta")
        engine.processors = 132
        weight = torch.empty(outputs, codes.shape[1], *kernel, dtype=torch.int8, device="meta")
        scale, bias = torch.empty(2, outputs, device="meta").unbind()
        engine.conv(weight, *how)(codes, 7, scale, bias)
        return dict(kept)

    return launch


def maps(*shape, offset=0):
    """Codes (N, C, H, W), channels_last, that begin `offset` bytes into their memory."""
    n, c, h, w = shape
    memory = torch.empty(offset + n * c * h * w, dtype=torch.uint8, device="meta")
    return memory[offset:].view(n, h, w, c).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "channels, offset, aligned, block",
    [(224, 0, 16, 64), (24, 0, 8, 32), (3, 0, 1, 32), (224, 4, 4, 64), (33, 64, 1, 64)],
)
def test_the_kernel_is_told_how_codes_are_aligned(channels, offset, aligned, block, launched):
    given = launched(maps(2, channels, 8, 8, offset=offset), 40)
    assert (given["ALIGNED"], given["BLOCK_K"]) == (aligned, block)
    assert given["codes"].storage_offset() == offset  # not copied


def test_only_padded_convolutions_look_for_borders(launched):
    given = launched(maps(2, 64, 8, 8), 40)
    assert given["PADDED"] and given["grid"] == (4,)  # 128 pixels and 40 outputs by 64 x 32
    assert not launched(maps(2, 64, 8, 8), 40, (1, 1), ((1, 1), (0, 0), (1, 1)))["PADDED"]
    assert launched(maps(2, 64, 8, 8), 40, (1, 3), ((1, 1), (0, 1), (1, 1)))["PADDED"]


def compiled(given, capability):
    """What Triton makes of a launch for a GPU of that compute capability, without one."""
    options = {name: given[name] for name in ("num_warps", "num_stages", "enable_fp_fusion")}
    constants = {name: given[name] for name in NAMES if name.isupper()}
    types = {torch.int8: "*i8", torch.int32: "*i32", torch.float32: "*fp32"}
    signature, attributes = {}, {}
    for place, name in enumerate(NAMES):
        value = given[name]
        is_tensor = torch.is_tensor(value)
        signature[name] = types[value.dtype] if is_tensor else "i32"
        if is_tensor and name != "zero_point" or not is_tensor and value and value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    attributes = {at: kept for at, kept in attributes.items() if NAMES[at[0]] not in constants}
    source = ASTSource(_convolve, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize(
    "capability, instruction",
    [(80, r"mma\.sync\S*\.s32\.s8\.s8\.s32"), (90, r"wgmma\.mma_async\S*\.s32\.s8\.s8")],
)
def test_on_gpus_bytes_are_multiplied_by_tensor_cores(
    capability, instruction, launched, tmp_path, monkeypatch
):
    """Operands arrive by asynchronous copies of 16 bytes and four bytes are shifted at once; the
    epilogue rounds twice."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    ptx = compiled(launched(maps(32, 224, 32, 32), 128), capability)["ptx"]
    assert re.search(instruction, ptx)
    copies = re.findall(r"cp\.async\.\S+ \[.*?\], \[.*?\], (\S+?),", ptx)
    assert len(copies) >= 8 and set(copies) == {"0x10"}
    assert "xor.b16" not in ptx and "prmt" not in ptx
    assert "mul.rn.f32" in ptx and "fma" not in ptx

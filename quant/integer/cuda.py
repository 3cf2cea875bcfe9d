"""Integer products on a GPU by one Triton kernel (quant/integer/triton_kernels.py): codes uint8,
weights int8, sums int32. The engine is used only where it gives the definition bit for bit, which
is tried on the GPU at hand before anything is computed with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

Product = Callable[..., torch.Tensor]
Sizes = Sequence[int]
ZeroPoint = int | torch.Tensor
DEEPEST = 2**16  # terms of a sum, each at most 255 * 128, that int32 holds


class CudaEngine:
    """Makes products of integer weights: functions of (codes, zero_point, scale (O,), bias (O,) or
    None, residual=None) -> (sum of (code - zero point) * weight) * scale + bias + residual,
    float32, in which padding is the zero point. The zero point is a number, or an int32 tensor ()
    on the device, which a CUDA graph reads anew whenever it is replayed.

    `largest` is the largest |weight| that is exact. Raises ImportError without Triton."""

    slow_zero_points = False
    largest = 128

    def __init__(self, device: torch.device | str):
        # it comes with PyTorch for CUDA alone, and takes a while
        from quant.integer import triton_kernels

        self.kernels, self.launch = triton_kernels, triton_kernels.launch
        self.device, self.processors = torch.device(device), 1
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            self.processors = properties.multi_processor_count
        numbers = torch.arange(256, dtype=torch.int32, device=self.device)
        self.zero_points = numbers.unbind()  # to bring a number there for each product costs time
        borders = numbers.to(torch.uint8)[:, None].expand(-1, triton_kernels.BORDER)
        self.borders = borders.contiguous().view(torch.int8)

    def conv(self, weight: torch.Tensor, stride: Sizes, padding: Sizes, dilation: Sizes) -> Product:
        """A convolution with weight (O, C, KH, KW) int8 of codes (N, C, H, W); these, the residual
        and the result (N, O, H', W') are channels_last. Raises ValueError for sums beyond int32."""
        kernel, packed = tuple(weight.shape[2:]), self._packed(weight)

        def product(codes, zero_point, scale, bias, residual=None):
            pixels = codes.permute(0, 2, 3, 1).contiguous()
            count, *size, channels = pixels.shape
            out_size = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, k, s, p, d in zip(size, kernel, stride, padding, dilation)
            ]
            sizes = *out_size, *size, channels
            out = codes.new_empty((count, *out_size, len(weight)), dtype=torch.float32)
            self._run(
                pixels,
                packed,
                self._on_device(zero_point),
                (scale, bias, None if residual is None else residual.permute(0, 2, 3, 1)),
                out,
                kernel,
                self.kernels.Geometry(*sizes, *stride, *padding, *dilation),
            )
            return out.permute(0, 3, 1, 2)

        return product

    def linear(self, weight: torch.Tensor) -> Product:
        """A product of codes (..., C) with weight (O, C) int8 -> (..., O)."""
        convolve = self.conv(weight[:, :, None, None], (1, 1), (0, 0), (1, 1))

        def product(codes, zero_point, scale, bias, residual=None):
            shape = *codes.shape[:-1], len(weight)
            if residual is not None:
                residual = residual.reshape(-1, len(weight), 1, 1)
            rows = codes.reshape(-1, codes.shape[-1], 1, 1)
            return convolve(rows, zero_point, scale, bias, residual).reshape(shape)

        return product

    def _packed(self, weight):
        """-> (O, taps * depth), the channels of every tap filled up with zeros; the sums (O,)."""
        terms = weight[0].numel()
        if terms > DEEPEST:
            raise ValueError(
                f"a layer sums {terms} products for each output, and int32 holds {DEEPEST} of 8 "
                "bits for certain; leave it out of the integer network"
            )
        weight = weight.to(self.device)
        missing = -weight.shape[1] % self.kernels.block_of(weight.shape[1])
        taps = F.pad(weight.permute(0, 2, 3, 1), (0, missing))
        return taps.flatten(1).contiguous(), weight.flatten(1).sum(1, dtype=torch.int32)

    def _on_device(self, zero_point: ZeroPoint) -> torch.Tensor:
        return zero_point if torch.is_tensor(zero_point) else self.zero_points[zero_point]

    def _run(self, pixels, packed, zero_point, terms, out, kernel, geometry):
        out = out.flatten(0, 2)
        self.launch(
            pixels.view(torch.int8),
            self.borders,
            *packed,
            zero_point,
            *(None if term is None else term.contiguous() for term in terms),
            out,
            kernel,
            geometry,
            self.kernels.choose_tile(*out.shape, self.processors),
        )


# Maps (count, channels, height, width) and weights (outputs, kernel), stride, padding, dilation,
# zero point: each with another tile of the kernel, the last one with rows of single pixels.
CASES = (
    ((2, 64, 8, 8), (256, 3, 3), (1, 1), (1, 1), (1, 1), 128),
    ((2, 40, 8, 8), (128, 3, 3), (1, 1), (1, 1), (1, 1), 7),
    ((2, 3, 8, 8), (60, 3, 3), (1, 1), (1, 1), (1, 1), 0),
    ((1, 96, 16, 15), (50, 3, 3), (2, 2), (1, 1), (1, 1), 255),
    ((1, 130, 11, 9), (21, 5, 2), (1, 2), (2, 0), (1, 3), 100),
    ((70, 100, 1, 1), (64, 1, 1), (1, 1), (0, 0), (1, 1), 255),
)


def cuda_engine(device: torch.device | str) -> CudaEngine | str:
    """The engine of this device, or one sentence why there is none."""
    return self_test(device) or CudaEngine(device)


def self_test(device: torch.device | str) -> str:
    """Why the engine must not be used on a device: it does not run there or gives, in one of CASES,
    other numbers than the definition computed on the CPU. "" if it is exact."""
    rng = torch.Generator().manual_seed(0)
    try:
        if torch.device(device).type == "cuda":
            capability = torch.cuda.get_device_capability(device)
            if capability < (8, 0):  # Triton would fail with a thousand lines
                found = ".".join(map(str, capability))
                return f"{device} has compute capability {found}; integer products need 8.0 or more"
        engine = CudaEngine(device)
        engine.processors = 1  # so that the tile follows from the shape
        for number, case in enumerate(CASES):
            if not _is_exact(engine, case, rng, number % 2 == 0):
                return f"the integer kernel on {device} differs from its definition ({case})"
    except Exception as error:  # compilers and drivers raise what they like
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"the integer kernel does not run on {device}: {reason}"
    return ""


def _is_exact(engine, case, rng, plain):
    """Whether one case gives the definition; `plain`: a number as zero point and a bias, else a
    tensor and a residual."""
    shape, (outputs, *kernel), *how, zero_point = case
    codes = torch.randint(0, 256, shape, generator=rng, device="cpu")
    codes[0] = 255
    weight = torch.randint(-128, 128, (outputs, shape[1], *kernel), generator=rng, device="cpu")
    weight[::2], weight[1::4] = -128, 127
    scale, bias = torch.rand(2, outputs, generator=rng, device="cpu") - 0.5
    # float64 holds these sums exactly, in any order
    stride, padding, dilation = how
    integers = (codes - zero_point).double()
    sums = F.conv2d(integers, weight.double(), None, stride, padding, dilation).float()
    expected = sums * scale[:, None, None]
    more = bias[:, None, None] if plain else torch.rand(sums.shape, generator=rng, device="cpu")
    expected = expected + more

    codes, scale, bias, more = (
        t.to(engine.device) for t in (codes.to(torch.uint8), scale, bias, more)
    )
    codes = codes.contiguous(memory_format=torch.channels_last)
    if shape[2:] == (1, 1):
        product, codes = engine.linear(weight[..., 0, 0].to(torch.int8)), codes.flatten(1)
        more = more.flatten(1)
    else:
        product = engine.conv(weight.to(torch.int8), *how)
    if plain:
        found = product(codes, zero_point, scale, bias)
    else:
        zero_point = torch.full((), zero_point, dtype=torch.int32, device=engine.device)
        found = product(codes, zero_point, scale, None, more)
    return torch.equal(found.cpu().reshape(expected.shape), expected)

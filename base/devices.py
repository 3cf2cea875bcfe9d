"""Which device computes, and what it computes itself."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from base.workers import count, local_number

Device = torch.device | str
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc


@contextmanager
def exact_arithmetic(threads: int = 0) -> Iterator[None]:
    """While inside, GPUs compute float32 as float32, convolutions too, and the same bytes every
    time, and the processor computes with `threads` threads (0: as many as before)."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic, torch.get_num_threads()
    try:
        cudnn.allow_tf32, cudnn.deterministic = False, True
        if threads:
            torch.set_num_threads(threads)
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before[:2]
        if threads:
            torch.set_num_threads(before[2])


def reuse_memory() -> None:
    """Lets this process keep the memory that tensors on the CPU free, for the next ones: the system
    hands out zeroed pages, which costs up to a third of the time of a network on integers. Does
    nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)  # smaller blocks come from the heap
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # of which nothing is given back


def return_memory() -> None:
    """Gives the system back what the C library keeps of the memory that tensors on the CPU freed,
    in the gaps between those that are left. Does nothing where the C library is not glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def resolve_device(word: str) -> torch.device:
    """Finds the device that a word means: "auto" (a GPU if there is one), "cpu", "cuda" or
    "cuda:1". Several workers (base/workers.py) take a GPU each. Raises ValueError for another word
    and for a GPU that is not there."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
        if count() == 1:
            return torch.device(word)
    try:
        device = torch.device(word)
    except RuntimeError:
        choices = "choose auto, cpu, cuda or cuda:NUMBER"
        raise ValueError(f"device '{word}' is unknown; {choices}") from None
    number = torch.cuda.device_count()
    if device.type == "cuda" and count() > 1:
        return _gpu_of_worker(device, number)
    if device.type == "cuda" and (device.index or 0) >= number:
        raise ValueError(
            f"device '{word}' was asked for, but PyTorch sees {number} CUDA devices; choose "
            "device=auto or device=cpu"
        )
    return device


def _gpu_of_worker(device, number):
    """The worker's own of a `number` of GPUs."""
    if device.index is not None:
        raise ValueError(
            f"device '{device}' is one GPU, and there are {count()} workers; choose device=auto"
        )
    if local_number() >= number:
        raise ValueError(
            f"a worker here would be number {local_number() + 1} on {number} CUDA devices; start "
            "one worker for each, or choose device=cpu"
        )
    return torch.device("cuda", local_number())


def computes_bfloat16(device: torch.device) -> bool:
    """Tells whether a device multiplies bfloat16 itself. A processor with AVX2 alone emulates it,
    several times slower than float32; ONEDNN_MAX_CPU_ISA is minded."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    emulated = has_avx512 and not torch.cpu._is_avx512_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and not emulated

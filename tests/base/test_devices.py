"""Which device a word means, and arithmetic that is exact only where it is asked for."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from base.devices import exact_arithmetic, resolve_device
from base.files import PROJECT


def flags():
    cudnn = torch.backends.cudnn
    return cudnn.allow_tf32, cudnn.deterministic, torch.get_num_threads()


@pytest.fixture
def loose(monkeypatch):
    """Flags as a user may have set them; with the processor's threads, as they were in the end."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    threads = torch.get_num_threads()
    yield True, False, threads
    torch.set_num_threads(threads)


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda' was asked for, but PyTorch sees 0 CUDA devices"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="'gpu' is unknown; choose auto, cpu"):
        resolve_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="'cuda:2' was asked for"):
        resolve_device("cuda:2")


def test_to_find_a_device_changes_nothing(loose):
    resolve_device("cpu")
    assert flags() == loose


def test_arithmetic_is_exact_inside_and_as_before_afterwards(loose):
    with exact_arithmetic(loose[2] + 1):
        assert flags() == (False, True, loose[2] + 1)
    with exact_arithmetic():
        assert flags() == (False, True, loose[2])
    assert flags() == loose


def test_what_fails_inside_leaves_all_as_it_was(loose):
    with pytest.raises(KeyError), exact_arithmetic(loose[2] + 1):
        raise KeyError
    assert flags() == loose


@pytest.mark.parametrize("isa, native", [("AVX2", False), ("AVX512_CORE_BF16", None)])
def test_bfloat16_is_computed_where_the_processor_has_it(isa, native):
    """In a process of its own: oneDNN reads the variable once. What the machine has itself limits
    the second case."""
    code = (
        "import torch; from base.devices import computes_bfloat16 as f; "
        "print(f(torch.device('cpu')), torch.cpu._is_avx512_bf16_supported())"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": isa},
    )
    found, machine = (word == "True" for word in ended.stdout.split())
    assert ended.returncode == 0 and found == (machine if native is None else native)


FAULTS = """
import resource, sys, torch
from base.devices import reuse_memory
torch.set_num_threads(1)
if sys.argv[1] == "reuse":
    reuse_memory()
for turn in range(8):
    if turn == 3:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**22, 2**24):  # 64 MB: longer than the default threshold ever grows
        torch.ones(size)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


RESIDENT = """
import torch
from base.devices import return_memory

def resident():  # MiB
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20

pieces = [torch.ones(2**14) for _ in range(1600)]  # 100 MiB of the heap
del pieces[:-1]  # the last one holds its end
before = resident()
return_memory()
print(before - resident(), pieces[0].sum().item())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the allocator of glibc")
def test_memory_below_what_is_left_is_returned():
    run = [sys.executable, "-c", RESIDENT]
    done = subprocess.run(run, capture_output=True, text=True, cwd=PROJECT, check=True)
    returned, left = map(float, done.stdout.split())
    assert 80 < returned < 120 and left == 2**14


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the allocator of glibc")
def test_memory_that_was_freed_is_used_again():
    """Page faults of ten tensors of 64 MB and less: one for every 4096 bytes, or nearly none; the
    heap may still grow by one or two of them, where something small has come to lie in a gap."""
    counts = {}
    for word in ("reuse", "default"):
        run = [sys.executable, "-c", FAULTS, word]
        done = subprocess.run(run, capture_output=True, text=True, cwd=PROJECT, check=True)
        counts[word] = int(done.stdout)
    assert counts["default"] > 10_000 and counts["default"] > 2 * counts["reuse"]

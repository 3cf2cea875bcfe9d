"""glue.cpp as a library: compiled for the processor and the PyTorch at hand, kept in the user's
cache, loaded beside PyTorch's own libraries, whose threads and exp it uses."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

# -ffp-contract=off: products and sums are rounded apart unless the source says fma
FLAGS = "-std=c++17 -O3 -shared -fPIC -w -ffp-contract=off -fno-math-errno".split()
SETS = {  # what PyTorch dispatches to -> flags
    "AVX2": "-mavx2 -mfma".split(),
    "AVX512": "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl".split(),
}
POINTER, SIZE = ctypes.c_void_p, ctypes.c_int64
GRID = [POINTER, *[ctypes.c_float] * 3, ctypes.c_int]
ARGUMENTS = {
    "glue_quantize": [*[POINTER] * 3, *[SIZE] * 3, *GRID, SIZE],
    "glue_softmax": [*[POINTER] * 3, *[SIZE] * 2, ctypes.c_float, *GRID[1:], SIZE],
    "glue_rescale": [*[POINTER] * 5, *[SIZE] * 3],
    "glue_norm_act": [*[POINTER] * 3, *[SIZE] * 4, POINTER, POINTER, ctypes.c_double]
    + [POINTER, SIZE, POINTER, POINTER, SIZE, ctypes.c_int, *GRID, POINTER, POINTER, SIZE],
    "glue_fused_bias": [*[POINTER] * 5, *[SIZE] * 3, POINTER],
}


def library() -> ctypes.CDLL:
    """The library with its functions declared. Raises ValueError where it cannot be compiled, and
    OSError where it cannot be loaded or kept."""
    loaded = ctypes.CDLL(str(_build()))
    for name, arguments in ARGUMENTS.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
    return loaded


def capability() -> str:
    """The instructions that PyTorch uses on this processor, as it calls them."""
    return torch.backends.cpu.get_cpu_capability()


def _build():
    """The path of the library, compiled unless it is there."""
    used = capability()
    if used not in SETS:
        raise ValueError(f"PyTorch uses {used} here, the glue knows {' and '.join(SETS)}")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise ValueError("no C++ compiler was found (g++, clang++ or what CXX names)")
    here, torch_cpu = Path(__file__).parent, Path(torch.__file__).parent / "lib/libtorch_cpu.so"
    sources = [path.read_text() for path in sorted(here.glob("glue*.*")) if path.suffix != ".py"]
    command = [*compiler.split(), *FLAGS, *SETS[used], str(here / "glue.cpp"), str(torch_cpu)]
    key = hashlib.sha256(repr((sources, command, torch.__version__)).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tinydm"
    target = cache / f"glue-{key[:16]}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:  # whole or not at all
            made = Path(folder) / "glue.so"
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True)
            if done.returncode:
                message = (done.stderr.strip() or "it said nothing").splitlines()[0]
                raise ValueError(f"{compiler} could not compile the glue: {message}")
            made.replace(target)
    return target

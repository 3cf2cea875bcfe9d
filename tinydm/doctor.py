"""Say what is here, what is missing and what that would enable:  tinydm doctor

Packages and their versions, the processor and what it computes itself, GPUs, the models that ship
(intact?), public checkpoints, what scores and prompts need. Nothing is fetched or changed."""

import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models.download import CHECKPOINTS, fault

PROJECT = Path(__file__).resolve().parents[1]
BASIC = ("torch", "numpy", "omegaconf", "safetensors", "tqdm")
NEEDED = dict.fromkeys(BASIC, "everything") | {
    "scipy": "allocation of widths",
    "pillow": "images as files",
    "torch-fidelity": "FID and other scores of distributions",
    "torchmetrics": "PSNR and SSIM",
    "matplotlib": "figures",
    "jinja2": "reports",
    "filelock": "several processes in one folder",
    "torchvision": "CIFAR-10",
    "pytorch-lightning": "training",
}
EXTRAS = {
    "submitit": ("comparisons as jobs, launcher=local|slurm", "pip install 'submitit>=1.5.2'"),
    "transformers": ("Stable Diffusion's prompts", "pip install 'transformers>=4.57'"),
    "pytest": ("the tests", "pip install pytest"),
    "nbclient": ("the test of the tutorial", "pip install nbformat nbclient ipykernel"),
}
# what is printed -> words of /proc/cpuinfo, any of which means it
FLAGS = {
    "AVX2": {"avx2"},
    "AVX-512": {"avx512f"},
    "VNNI": {"avx512_vnni", "avx_vnni"},
    "bfloat16": {"avx512_bf16"},
    "AMX": {"amx_tile"},
}
INCEPTION_SHA256 = "6726825d"  # first digits
INCEPTION = "*inception-2015-12-05-6726825d.pth"  # two files of the same bytes are known
TOKENIZER = ("vocab.json", "merges.txt")
MISSING = "missing"


@dataclass(frozen=True)
class Finding:
    """One line: what was looked for, what was found, what it gives, and how to get it."""

    what: str
    found: str
    gives: str = ""
    remedy: str = ""

    @property
    def is_missing(self) -> bool:
        return self.found == MISSING

    def __str__(self) -> str:
        if not self.remedy:
            return f"  {self.what:26} {self.found}"
        gives = f"; would enable {self.gives}" if self.gives else ""
        return f"- {self.what:26} {self.found}{gives}: {self.remedy}"


def run(words: list[str]) -> None:
    if words:
        raise ValueError(f"doctor takes no words, found {' '.join(words)}")
    print(report(examine()))


def examine() -> dict[str, list[Finding]]:
    """Heading -> findings. Without PyTorch the sections that need it are left out."""
    found = {
        "Packages": [*packages()],
        "Computer": [*computer()],
        "Models that ship": [*shipped(PROJECT / "models/weights")],
        "Optional packages": [*extras()],
    }
    if all(version_of(name) != MISSING for name in BASIC):
        found["Devices"] = [*devices()]
        found["Public checkpoints"] = [*checkpoints()]
        found["For scores, prompts and training"] = [*references()]
    return found


def report(found: dict[str, list[Finding]]) -> str:
    """The findings as text; lines that begin with - are what could be mended."""
    return "\n\n".join("\n".join([title, *map(str, rows)]) for title, rows in found.items())


def packages() -> Iterator[Finding]:
    yield Finding("Python", platform.python_version())
    for name, gives in NEEDED.items():
        yield _package(name, gives, f"pip install {name}")


def extras() -> Iterator[Finding]:
    for name, (gives, remedy) in EXTRAS.items():
        yield _package(name, gives, remedy)


def _package(name: str, gives: str, remedy: str) -> Finding:
    found = version_of(name)
    return Finding(name, found, gives, remedy if found == MISSING else "")


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return MISSING


def computer() -> Iterator[Finding]:
    """The processor, its cores, memory and the free disk space of the current folder."""
    name, flags = processor(_read("/proc/cpuinfo"))
    yield Finding("processor", name or platform.processor() or platform.machine())
    has = {word for word, meaning in FLAGS.items() if meaning & flags}
    yield Finding("it computes", ", ".join(word for word in FLAGS if word in has) or "unknown")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cores", f"{usable} of {os.cpu_count()}")
    memory = dict(re.findall(r"^(Mem\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.M))
    if {"MemTotal", "MemAvailable"} <= memory.keys():
        total, free = (int(memory[key]) / 2**20 for key in ("MemTotal", "MemAvailable"))
        yield Finding("memory", f"{free:.1f} GiB free of {total:.1f}")
    yield Finding("disk, current folder", f"{shutil.disk_usage('.').free / 2**30:.1f} GiB free")


def processor(cpuinfo: str) -> tuple[str, set[str]]:
    """Name and flags of the first processor in the text of /proc/cpuinfo."""
    found = re.findall(r"^(model name|flags)\s*: (.*)$", cpuinfo, re.MULTILINE)
    first = dict(reversed(found))
    return first.get("model name", ""), set(first.get("flags", "").split())


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def devices() -> Iterator[Finding]:
    import torch

    from base.devices import computes_bfloat16

    cpu = torch.device("cpu")
    itself = "computes bfloat16 itself" if computes_bfloat16(cpu) else "emulates bfloat16"
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("cpu", f"{capability}, {itself}, {torch.get_num_threads()} threads")
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        size = f"{facts.total_memory / 2**30:.0f} GiB, compute {facts.major}.{facts.minor}"
        yield Finding(f"cuda:{number}", f"{facts.name}, {size}")
    if not torch.cuda.is_available():
        yield Finding("cuda", "no GPU that PyTorch sees")


def shipped(folder: Path) -> Iterator[Finding]:
    """The files that SHA256SUMS of `folder` lists: intact, damaged or missing."""
    remedy = "restore it from the repository"
    sums = folder / "SHA256SUMS"
    if not sums.is_file():
        yield Finding("SHA256SUMS", MISSING, "what ships can be checked", remedy)
        return
    for line in sums.read_text().splitlines():
        digest, name = line.split()
        path = folder / name
        found = MISSING if not path.is_file() else fault(path, f"sha256 {digest}") or "intact"
        yield Finding(path.stem, found, "", "" if found == "intact" else remedy)


def checkpoints() -> Iterator[Finding]:
    from models.diffusion import find_checkpoint

    for name, row in CHECKPOINTS.items():
        try:
            found = find_checkpoint({"name": name, "checkpoint": f"models/{row.path}"})
            yield Finding(name, str(found))
        except ValueError:
            yield Finding(name, MISSING, row.about, f"tinydm download {name}")


def references() -> Iterator[Finding]:
    import torch

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    files = sorted(cache.glob(INCEPTION))
    remedy = f"evaluation.fetch=true, or put the file into {cache}"
    if not files:
        yield Finding("Inception weights", MISSING, "FID as published", remedy)
    else:
        digest = hashlib.sha256(files[0].read_bytes()).hexdigest()
        damaged = not digest.startswith(INCEPTION_SHA256)
        found = f"{files[0]} is damaged" if damaged else str(files[0])
        yield Finding("Inception weights", found, "", remedy if damaged else "")
    data, gives = Path("data/cifar-10-batches-py"), "training, calibration.start=i2n"
    yield _folder_of("CIFAR-10", data, (), gives, "data=cifar10")
    clip = PROJECT / "models/tokenizer/clip-vit-large-patch14"
    remedy = f"put {' and '.join(TOKENIZER)} into {clip}"
    yield _folder_of("CLIP's tokenizer", clip, TOKENIZER, "Stable Diffusion's prompts", remedy)


def _folder_of(what: str, folder: Path, names: tuple[str, ...], gives: str, remedy: str) -> Finding:
    if folder.is_dir() and all((folder / name).is_file() for name in names):
        return Finding(what, str(folder))
    return Finding(what, MISSING, gives, remedy)

"""What a ratio was measured on: it means nothing without."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from tinydm.doctor import FLAGS, processor

CPUINFO = Path("/proc/cpuinfo")
HELD = "ONEDNN_MAX_CPU_ISA"
FAST = "VNNI", "bfloat16", "AMX"  # of FLAGS, what decides about integers


def machine(device: torch.device, threads: int) -> dict[str, Any]:
    """Name, instruction set and threads, which make it another machine; versions and the date."""
    facts = {"threads": threads, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        isa = f"compute {card.major}.{card.minor}, CUDA {torch.version.cuda}"
        return {"name": card.name, "isa": isa} | facts
    text = CPUINFO.read_text() if CPUINFO.is_file() else ""
    name, flags = processor(text)
    capability = torch.backends.cpu.get_cpu_capability()
    isa = instruction_set(capability, flags, os.environ.get(HELD, ""))
    return {"name": name or platform.machine(), "isa": isa} | facts


def instruction_set(capability: str, flags: set[str], held: str) -> str:
    """In words: what PyTorch's own kernels use, then what the processor has beside that, or what
    oneDNN, which multiplies, is held to."""
    if held:
        return f"{capability}, {HELD}={held}"
    return ", ".join([capability, *(word for word in FAST if FLAGS[word] & flags)])


def label(facts: dict[str, Any]) -> str:
    """A machine in few words; results of the same one take each other's place."""
    threads = f"{facts['threads']} thread" + "s" * (facts["threads"] != 1)
    return f"{facts['name']}, {facts['isa']}, {threads}"

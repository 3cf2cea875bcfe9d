"""What the capture of activations takes, and what gives way where it does not fit.

Values are float32 as long as the walk over all units (capture.py) fits into memory and disk.
Where it does not, they are kept in bfloat16; where that does not fit either, outputs that are read
much later, as the skips of a U-Net are, are given up in between and computed again from what is
kept. All of it follows from the graph and the number of samples, before the walk begins."""

import itertools
import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from base.workers import agreed, count
from quant.graph import Graph
from quant.reconstruction.store import BYTES, Account

GB = 2**30
RESERVE_GB = 2.0  # of the free disk, left to everybody else
NETWORKS = 2  # captured side by side: in full precision and quantized


@dataclass(frozen=True)
class Capture:
    """How activations are kept: through which unit (its index) each output, in which type; the most
    bytes in memory and on disk; `wanted`, the bytes of all in float32; `passes`, forward passes of
    the network over the samples that computing again takes, and `dropped` outputs given up."""

    keep: dict[str, int]
    dtype: torch.dtype
    memory: int
    disk: int
    wanted: int
    passes: float = 0.0
    dropped: int = 0

    @property
    def exact(self) -> bool:
        """Whether all values are those of whole forward passes, bit by bit."""
        return self.dtype == torch.float32

    def __str__(self):
        text = f"{self.wanted / GB:.1f} GiB of activations in float32"
        if not self.exact:
            text += " are more than memory_gb and disk_gb hold; kept in bfloat16"
        if self.dropped:
            text += (
                f", {self.dropped} of {len(self.keep)} outputs computed again where they are read "
                f"({self.passes:.2f} forward passes more)"
            )
        return f"{text}: {self.memory / GB:.1f} GiB in memory, {self.disk / GB:.1f} on disk"


def disk_budget(disk_gb: float | None, folder: Path | str) -> float:
    """Returns the GiB that may be written under a folder, which need not be there yet: what is free
    less a reserve, but no more than `disk_gb` unless that is None."""
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = max(0.0, shutil.disk_usage(there).free / GB - RESERVE_GB)
    return free if disk_gb is None else min(disk_gb, free)


def capture_of(job: Any) -> Capture:
    """Decides how the activations of the calibration set of a Job (quant/passes/job.py) are kept.
    Several workers (base/workers.py) decide alike, and have the disk together. Raises ValueError
    where its memory and disk do not hold them."""
    disk_gb = agreed(disk_budget(job.disk_gb, job.resume_folder)) / count()
    return plan_capture(job.graph, len(job.calibration), job.memory_gb, disk_gb)


def plan_capture(graph: Graph, samples: int, memory_gb: float, disk_gb: float) -> Capture:
    """Decides how the activations of `samples` calibration samples are kept within so many GiB of
    memory and of disk. Raises ValueError where nothing fits."""
    memory, disk, keep = int(memory_gb * GB), int(disk_gb * GB), graph.last_use
    wanted = _Walk(graph, keep, samples * BYTES[torch.float32], math.inf).account.peak_memory
    for dtype, size in BYTES.items():
        walk = _Walk(graph, keep, samples * size, memory)
        if walk.over(disk) == 0:
            return _capture(graph, walk, dtype, wanted)
    gaps = _gaps(graph)
    while gaps:
        walks = {n: _Walk(graph, keep | {n: gaps[n]}, walk.each, memory) for n in gaps}
        best = max(gaps, key=lambda n: _gain(graph, walk, walks[n], disk))
        if walks[best].over(disk) >= walk.over(disk):
            break
        walk, keep = walks[best], keep | {best: gaps.pop(best)}
        if walk.over(disk) == 0:
            return _capture(graph, walk, dtype, wanted)
    raise ValueError(
        f"reconstruction keeps {walk.account.peak_disk / GB:.1f} GiB of activations on disk at the "
        f"least, in bfloat16 and beside memory_gb={memory_gb:g}, and disk_gb or what is free "
        f"allows {disk_gb:.1f}; raise disk_gb or memory_gb, or take fewer calibration.images"
    )


def _capture(graph, walk, dtype, wanted):
    account, keep, last_use = walk.account, walk.keep, graph.last_use
    dropped, passes = sum(keep[n] < last_use[n] for n in keep), walk.passes
    return Capture(keep, dtype, account.peak_memory, account.peak_disk, wanted, passes, dropped)


class _Walk:
    """What the streams of two networks take and give back as `reconstruct` leads them through all
    units, `each` bytes for every value of a sample: the account, and the most bytes on disk at
    every unit."""

    def __init__(self, graph, keep, each, memory):
        self.graph, self.keep, self.each = graph, keep, each
        self.account, self.on_disk = Account(memory), []
        streams = [{} for _ in range(NETWORKS)]
        for i, unit in enumerate(graph.units):
            self.account.peak_disk = self.account.disk
            lent = [self._inputs(i, unit, outputs) for outputs in streams]
            for outputs, entries in zip(streams, lent):
                outputs[unit] = self._take(graph.outputs[unit])
                for entry in entries:
                    self.account.give_back(entry)
            self.on_disk.append(self.account.peak_disk)
        self.account.peak_disk = max(self.on_disk)

    def _take(self, values):
        return self.account.take(values * self.each)

    def _inputs(self, i, unit, outputs):
        """Does to the account what Stream.inputs does; what Stream.free gives back."""
        read = self.graph.arguments[unit]
        lent = [self._take(values) for values, own in read if own not in outputs]
        for name in [n for n in outputs if self.keep[n] <= i]:
            entry = outputs.pop(name)
            if any(name == own for _, own in read):
                lent.append(entry)
            else:
                self.account.give_back(entry)
        return lent

    def over(self, disk):
        """Bytes that do not fit on the disk, added up over all units."""
        return sum(max(0, taken - disk) for taken in self.on_disk)

    @cached_property
    def passes(self):
        """Forward passes of a network over all samples that running units again takes."""
        again, work = 0, self.graph.work
        for i, unit in enumerate(self.graph.units):
            kept = {n for n in self.graph.units[:i] if self.keep[n] >= i}
            again += sum(work[n] for n in self.graph.way_to(unit, kept)[1])
        return NETWORKS * again / sum(work.values())


def _gain(graph, walk, other, disk):
    """Bytes less of what does not fit, for a forward pass more."""
    return (walk.over(disk) - other.over(disk)) / (other.passes - walk.passes + 1e-6)


def _gaps(graph):
    """Outputs that are not read for a while -> the index of the unit before the longest while."""
    least, found = max(graph.outputs.values()) / 100, {}
    for i, (name, readers) in enumerate(graph.readers.items()):
        pairs = itertools.pairwise([i, *readers])
        length, start = max(((b - a, a) for a, b in pairs), default=(0, i))
        if length > 1 and graph.outputs[name] >= least:
            found[name] = start
    return found

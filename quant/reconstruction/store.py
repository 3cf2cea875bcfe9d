"""Where the tensors of a capture lie: in memory as long as they fit, beyond that in files."""

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

BYTES = {torch.float32: 4, torch.bfloat16: 2}  # of a value
Entry = tuple[int, int]  # bytes in memory, bytes on disk


class Account:
    """Counts bytes in memory, up to `budget`, and beyond that on disk, and the most of either."""

    def __init__(self, budget: int):
        self.budget = budget
        self.memory = self.disk = self.peak_memory = self.peak_disk = 0

    def take(self, size: int) -> Entry:
        """Enters `size` bytes, all in memory or all on disk."""
        entry = (size, 0) if self.memory + size <= self.budget else (0, size)
        self.memory, self.disk = self.memory + entry[0], self.disk + entry[1]
        self.peak_memory = max(self.peak_memory, self.memory)
        self.peak_disk = max(self.peak_disk, self.disk)
        return entry

    def give_back(self, entry: Entry) -> None:
        """Takes off again what `take` entered."""
        self.memory, self.disk = self.memory - entry[0], self.disk - entry[1]


class Halved:
    """A tensor (N, ...) kept in bfloat16; by rows it is read and written in float32."""

    def __init__(self, kept: torch.Tensor):
        self.kept, self.shape = kept, kept.shape

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.kept[rows].float()

    def __setitem__(self, rows: slice, values: torch.Tensor) -> None:
        self.kept[rows] = values


Rows = torch.Tensor | Halved  # of values for all samples, read and written by rows in float32


class Store:
    """Tensors in memory up to `memory_gb`, beyond that in unlinked files under `folder`, mapped
    into memory. Values are kept in `dtype`, float32 or bfloat16."""

    def __init__(self, memory_gb: float, folder: Path, dtype: torch.dtype = torch.float32):
        self.account, self.folder = Account(int(memory_gb * 2**30)), Path(folder)
        self.dtype, self.entries = dtype, {}

    def empty(self, shape: Iterable[int]) -> Rows:
        """Returns uninitialised values. Raises OSError when the disk is full."""
        count = int(torch.Size(shape).numel())
        entry = self.account.take(BYTES[self.dtype] * count)
        tensor = (self._on_disk(count) if entry[1] else self._in_memory(count)).view(shape)
        rows = tensor if self.dtype == torch.float32 else Halved(tensor)
        self.entries[id(rows)] = entry
        return rows

    def _in_memory(self, count):
        """Apart from the heap, in whose gaps what is given back would stay with the process."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        pages = mmap.mmap(-1, max(1, BYTES[self.dtype] * count), flags)
        return torch.frombuffer(pages, dtype=self.dtype, count=count)

    def _on_disk(self, count):
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=self.folder, suffix=".spill")
        try:
            # no crash later on, when the disk is full
            os.posix_fallocate(handle, 0, BYTES[self.dtype] * count)
            return torch.from_file(path, shared=True, size=count, dtype=self.dtype)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps the space until it is dropped

    def free(self, rows: Any) -> None:
        """Takes what `empty` gave off the account; anything else is none of its business."""
        if id(rows) in self.entries:
            self.account.give_back(self.entries.pop(id(rows)))

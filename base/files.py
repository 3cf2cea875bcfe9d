"""Atomic writing: a file is the old one or the complete new one; safetensors with metadata."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PROJECT = Path(__file__).resolve().parents[1]
Tensors = dict[str, torch.Tensor]  # by name, as a safetensors file holds them


def write_atomically(path: Path | str, write: Callable[[Path], Any]) -> None:
    """Call write(temporary path), flush to disk, and rename to `path`; a failed write leaves
    nothing behind. The file gets the mode that the umask gives to new files, whatever mode
    `write` chose (safetensors writes files that only their owner can read)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)  # left by a kill
    try:
        part.touch()
        mode = part.stat().st_mode
        write(part)
        part.chmod(mode)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder: Path | str) -> Iterator[None]:
    """Let one process at a time inside, for writers of the same `folder`, made if need be."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".writing.lock"
    with FileLock(path):
        try:
            yield
        finally:
            # While the lock is held, so that those who wait find the file gone and make a new one.
            path.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda part: part.write_text(text))


def write_lines(path: Path | str, rows: Iterable[Any]) -> None:
    """Write a JSON Lines file, a line a row, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path | str) -> list[Any]:
    """Read the rows of a JSON Lines file; none of one that is not there."""
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def sha256(path: Path | str) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def save_tensors(path: Path | str, tensors: Tensors, metadata: dict[str, Any]) -> None:
    """Write contiguous CPU copies of `tensors` and a JSON-able dict as safetensors. Equal contents
    give equal bytes: the library writes several metadata keys in any order, so there is one."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {"tinydm": json.dumps(metadata, sort_keys=True)}
    write_atomically(path, lambda part: save_file(tensors, part, text))


def load_tensors(
    path: Path | str, *, only_metadata: bool = False
) -> tuple[Tensors, dict[str, Any]]:
    """Read a safetensors file -> ({name: tensor}, metadata). The metadata is {} in a file that
    `save_tensors` did not write. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            names = [] if only_metadata else file.keys()
            tensors = {name: file.get_tensor(name) for name in names}
            return tensors, json.loads((file.metadata() or {}).get("tinydm", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        remedy = "remove it and make it again"
        raise ValueError(f"{path} is cut off or no safetensors file ({error}); {remedy}") from None

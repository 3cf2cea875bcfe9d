"""Atomic writing: a file is either the old one or the complete new one, whatever happens in
between; and safetensors with metadata of ours."""

import fcntl
import json
import os
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

PROJECT = Path(__file__).resolve().parents[1]


def write_atomically(path, write):
    """write(temporary path), flush to disk, rename to `path`; a failed write leaves nothing
    behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # left by a kill, it is overwritten by the next write
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def alone(folder):
    """One process at a time inside: several may write the same files of a folder, which is made if
    need be."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write_text(path, text):
    write_atomically(path, lambda part: part.write_text(text))


def save_tensors(path, tensors, metadata):
    """Contiguous CPU copies of `tensors` and a JSON-able dict as safetensors; equal contents give
    equal bytes (the library writes several metadata keys in any order, so there is one)."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = {"tinydm": json.dumps(metadata, sort_keys=True)}
    write_atomically(path, lambda part: save_file(tensors, part, text))


def load_tensors(path, *, only_metadata=False):
    """-> ({name: tensor}, metadata) of a safetensors file; metadata is {} in a file that
    `save_tensors` did not write. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            tensors = {} if only_metadata else {name: file.get_tensor(name) for name in file.keys()}
            return tensors, json.loads((file.metadata() or {}).get("tinydm", "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is cut off or no safetensors file ({error}); remove it and make it again"
        ) from None

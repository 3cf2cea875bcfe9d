"""Atomic writing: a file is either the old one or the complete new one, whatever happens in between."""
import os
import threading
from pathlib import Path

from safetensors.torch import save_file


def write_atomically(path, write):
    """write(temporary path), flush to disk, rename to `path`; a failed write leaves nothing behind."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        write(part)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_text(path, text):
    write_atomically(path, lambda part: part.write_text(text))


def save_tensors(path, tensors, metadata):
    """Contiguous CPU copies of `tensors` and string metadata as safetensors."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda part: save_file(tensors, part, metadata))

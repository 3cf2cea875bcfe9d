"""Reading checkpoint files: which file, which container, and what is wrong with them in one
sentence.

Nothing in a checkpoint is ever run: pickles are read by PyTorch's restricted reader, which knows
tensors only, and where a file holds more than that by models/pickles.py, which lets the rest go."""

import json
import logging
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from models import diffusers, pickles
from models.kinds import abridge

PICKLES = {".ckpt", ".pt", ".pth"}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}
# folder of a pipeline of the diffusers library -> prefix that its weights get
PIPELINE = {"unet": "", "vqvae": PREFIXES["first_stage"], "vae": PREFIXES["first_stage"]}


def load_state(path: Path | str, *, ema: bool = True) -> dict[str, torch.Tensor]:
    """Reads a checkpoint file, or a folder as the diffusers library saves it: parameter name -> CPU
    tensor.

    Containers are a flat dict, {"state_dict": dict}, and the list that a DDIM training run leaves
    (network, optimizer, epoch, step, averaged weights), of which `ema` takes the averaged set.
    Raises ValueError for a file that is absent, damaged, not a checkpoint, or asks to run code."""
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(
            f"checkpoint {path} does not exist; name an existing file with checkpoint=PATH"
        )
    if path.suffix not in PICKLES | {".safetensors"}:
        raise ValueError(
            f"checkpoint {path} ends in '{path.suffix}'; "
            f"expected one of {', '.join(sorted(PICKLES))}, .safetensors"
        )
    return _read_file(path, ema)


def _read_file(path, ema=True):
    if path.suffix != ".safetensors":
        return _weights_in(_read_pickle(path), path, ema)
    try:
        return _weights_in(load_file(path), path, ema)
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from None


def _read_pickle(path):
    mmap = _can_be_mapped(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # it holds more than tensors or is damaged: the other reader tells which
        pass
    try:
        content, skipped = pickles.read(path, mmap=mmap)
    except (pickles.Refused, PermissionError):
        raise
    except Exception as error:  # a broken pickle can end in any exception
        raise ValueError(_damaged(path, error)) from None
    if skipped:
        logging.getLogger("tinydm").info(
            f"checkpoint {path}: took the tensors, skipped Python objects of {abridge(skipped)}"
        )
    return content


def _can_be_mapped(path):
    """Whether the tensors lie in the file as they are, so that few need to be read."""
    try:
        with ZipFile(path) as file:
            return all(member.compress_type == ZIP_STORED for member in file.infolist())
    except (BadZipFile, OSError):
        return False


def _read_folder(path):
    """Weights of a diffusers folder under the published names: those of an autoencoder prefixed."""
    parts = [name for name in PIPELINE if (path / name / "config.json").is_file()]
    state = {}
    for part in parts or [""]:
        folder, prefix = path / part, PIPELINE.get(part, "")
        files = [folder / name for name in diffusers.FILES if (folder / name).is_file()]
        if not files or not (folder / "config.json").is_file():
            raise ValueError(
                f"checkpoint {path} is a folder without config.json and "
                f"{' or '.join(diffusers.FILES)}, of its own or below unet; give a checkpoint "
                "file, or a folder saved by diffusers"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ValueError(_damaged(folder / "config.json", error)) from None
        try:
            named = diffusers.to_published(_read_file(files[0]), config)
        except diffusers.Unfit as error:
            raise ValueError(f"checkpoint {folder} {error}") from None
        state.update({prefix + name: value for name, value in named.items()})
    return state


def _damaged(path, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"checkpoint {path} ({path.stat().st_size} bytes) is damaged or incomplete "
        f"({reason[:120]}); delete it and download or copy it again"
    )


def _weights_in(content, path, ema):
    if isinstance(content, list) and content:
        content = content[-1 if ema else 0]
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    is_filled = isinstance(content, dict) and content
    if not is_filled or not all(map(torch.is_tensor, content.values())):
        raise ValueError(
            f"checkpoint {path} is no state dict; expected parameter names with tensors, that "
            "under the key state_dict, or a list whose last element is that"
        )
    wrapper = "module."  # left by data-parallel training
    is_wrapped = all(name.startswith(wrapper) for name in content)
    return component(content, wrapper) if is_wrapped else dict(content)


def component(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Takes the entries of `state` whose names begin with `prefix`, without it."""
    own = [name for name in state if name.startswith(prefix)]
    return {name.removeprefix(prefix): state[name] for name in own}

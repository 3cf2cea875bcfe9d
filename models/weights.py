"""Reading checkpoints: which file, which container, which keys, and what is wrong with them in one sentence.

Nothing in a checkpoint is ever run: pickles are read by PyTorch's restricted reader, which knows tensors only.
"""
import hashlib
import pickle
from pathlib import Path
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

PICKLES = {".ckpt", ".pt", ".pth"}
SHOWN = 3                                   # names listed in a message before "and n more"


def load_state(path, *, ema=True):
    """Parameter name -> CPU tensor of a checkpoint file.

    Containers: a flat dict, {"state_dict": dict}, or the list a DDIM training run leaves (network, optimizer, epoch,
    step, averaged weights), of which `ema` takes the averaged set. Raises ValueError for a file that is absent,
    damaged, not a checkpoint, or holds code.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist; name an existing file with checkpoint=PATH")
    if path.suffix not in PICKLES | {".safetensors"}:
        raise ValueError(f"checkpoint {path} ends in '{path.suffix}'; "
                         f"expected one of {', '.join(sorted(PICKLES))}, .safetensors")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _weights_in(content, path, ema)


def _read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from None


def _read_pickle(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "nsupported" in str(error):      # a class, a function or an instruction that tensors do not need
            raise ValueError(f"checkpoint {path} holds Python objects other than tensors, and loading those could run "
                             "code, so nothing was loaded; save its state dict alone and give that file") from None
        raise ValueError(_damaged(path, error)) from None
    except (RuntimeError, EOFError, OSError, BadZipFile, KeyError, ValueError, AssertionError) as error:
        raise ValueError(_damaged(path, error)) from None


def _damaged(path, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (f"checkpoint {path} ({path.stat().st_size} bytes) is damaged or incomplete ({reason[:120]}); "
            "delete it and download or copy it again")


def _weights_in(content, path, ema):
    if isinstance(content, list) and content:
        content = content[-1 if ema else 0]
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(torch.is_tensor(v) for v in content.values()):
        raise ValueError(f"checkpoint {path} is no state dict; expected parameter names with tensors, that under the "
                         "key state_dict, or a list whose last element is that")
    wrapper = "module."                     # left by data-parallel training
    if all(name.startswith(wrapper) for name in content):
        return {name.removeprefix(wrapper): value for name, value in content.items()}
    return dict(content)


def load_weights(net, state, source):
    """Copy `state` into `net`, every key and shape checked, in the dtype of the network; returns `net`.

    `source` names the checkpoint in messages. Raises ValueError for missing, surplus, misshapen or non-finite weights
    and leaves `net` as it was.
    """
    own = net.state_dict()
    shared = [name for name in own if name in state]
    faults = {"misses": [name for name in own if name not in state],
              "has surplus": [name for name in state if name not in own],
              "has misshapen": [f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
                                for name in shared if state[name].shape != own[name].shape]}
    if any(faults.values()):
        found = "; ".join(f"it {fault} {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"{source} does not fit the network: {found}; give the checkpoint that belongs to the "
                         "model YAML, or correct its network options")
    broken = [name for name in own if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(f"{source} has NaN or infinite weights in {_some(broken)}; it is unusable, get another copy")
    net.load_state_dict({name: state[name].to(own[name].dtype) for name in own})
    return net


def _some(names):
    listed = ", ".join(names[:SHOWN])
    return f"{len(names)} ({listed}{', ...' if len(names) > SHOWN else ''})"


def sha256_of(path):
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def state_hash(net):
    """Hexadecimal SHA-256 over names and bytes of the state dict in its order: equal for equal weights."""
    digest = hashlib.sha256()
    for name, value in net.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

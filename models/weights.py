"""Reading checkpoints: which file, which container, which component, which keys, and what is wrong
with them in one sentence.

Nothing in a checkpoint is ever run: pickles are read by PyTorch's restricted reader, which knows
tensors only, and where a file holds more than that by models/pickles.py, which lets the rest go.
"""

import hashlib
import json
import re
from pathlib import Path
from zipfile import ZIP_STORED, BadZipFile, ZipFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from base.errors import unknown_word
from models import diffusers, pickles

PICKLES = {".ckpt", ".pt", ".pth"}
PREFIXES = {
    "unet": "model.diffusion_model.",
    "first_stage": "first_stage_model.",
    "cond_stage": "cond_stage_model.",
}
AVERAGED = "model_ema."
# in some files a weight, though it only counts 0, 1, 2, ...
CONSTANT = "position_ids"
SHOWN = 3  # names listed in a message before "and n more"

# what a file seems to be: the first whose pattern begins a name in it
KINDS = {
    "a quantized model of this project": r".*\.weight_codes$|.*weight_quantizer\.",
    "a Stable Diffusion checkpoint": r"cond_stage_model\.transformer\.",
    "a latent-diffusion checkpoint": r"model\.diffusion_model\.",
    "a classifier of guided diffusion": r"out\.\d\.(qkv_proj|positional_embedding)",
    "a U-Net of latent, improved or guided diffusion alone": r"input_blocks\.",
    "a pixel-space DDIM U-Net": r"temb\.dense\.",
    "a first stage (autoencoder) alone": r"(encoder|decoder)\.conv_in\.",
    "a network of the diffusers library (give its whole folder, with config.json)": r"(down|mid|up)_blocks?\.",
    "a text encoder": r"(transformer\.)?text_model\.",
    "an image classifier": r"(stem|layer1|features)\.|(fc|head|classifier)\.weight$",
}


# ---- files


def load_state(path, *, ema=True):
    """Parameter name -> CPU tensor of a checkpoint file, or of a folder as the diffusers library
    saves it.

    Containers: a flat dict, {"state_dict": dict}, or the list a DDIM training run leaves (network,
    optimizer, epoch, step, averaged weights), of which `ema` takes the averaged set. Raises
    ValueError for a file that is absent, damaged, not a checkpoint, or asks to run code."""
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
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return _weights_in(content, path, ema)


def _read_safetensors(path):
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(_damaged(path, error)) from None


def _read_pickle(path):
    mmap = _can_be_mapped(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    # it holds more than tensors or is damaged: the other reader tells which
    except Exception:
        pass
    try:
        content, skipped = pickles.read(path, mmap=mmap)
    except (pickles.Refused, PermissionError):
        raise
    except Exception as error:  # a broken pickle can end in any exception
        raise ValueError(_damaged(path, error)) from None
    if skipped:
        print(
            f"checkpoint {path}: took the tensors, skipped Python objects of {_some(skipped)}",
            flush=True,
        )
    return content


def _can_be_mapped(path):
    """Whether the tensors lie in the file as they are, so that only those that are used need to be
    read."""
    try:
        with ZipFile(path) as file:
            return all(member.compress_type == ZIP_STORED for member in file.infolist())
    except (BadZipFile, OSError):
        return False


def _read_folder(path):
    """Weights of a diffusers folder under the published names: U-Net as it is, autoencoder behind
    its prefix."""
    pipeline = {"unet": "", "vqvae": PREFIXES["first_stage"], "vae": PREFIXES["first_stage"]}
    parts = {
        path / name: prefix
        for name, prefix in pipeline.items()
        if (path / name / "config.json").is_file()
    }
    state = {}
    for folder, prefix in (parts or {path: ""}).items():
        files = [folder / name for name in diffusers.FILES if (folder / name).is_file()]
        if not files or not (folder / "config.json").is_file():
            raise ValueError(
                f"checkpoint {path} is a folder without config.json and "
                f"{' or '.join(diffusers.FILES)}, "
                "of its own or below unet; give a checkpoint file, or a folder saved by diffusers"
            )
        try:
            config = json.loads((folder / "config.json").read_text())
        except ValueError as error:
            raise ValueError(_damaged(folder / "config.json", error)) from None
        try:
            named = diffusers.published(_read_file(files[0]), config)
        except diffusers.Unfit as error:
            raise ValueError(f"checkpoint {folder} {error}") from None
        state.update({prefix + name: value for name, value in named.items()})
    return state


def _damaged(path, error):
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return (
        f"checkpoint {path} ({path.stat().st_size} bytes) is damaged or incomplete "
        f"({reason[:120]}); "
        "delete it and download or copy it again"
    )


def _weights_in(content, path, ema):
    if isinstance(content, list) and content:
        content = content[-1 if ema else 0]
    elif isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if (
        not isinstance(content, dict)
        or not content
        or not all(torch.is_tensor(v) for v in content.values())
    ):
        raise ValueError(
            f"checkpoint {path} is no state dict; expected parameter names with tensors, that "
            "under the "
            "key state_dict, or a list whose last element is that"
        )
    wrapper = "module."  # left by data-parallel training
    if all(name.startswith(wrapper) for name in content):
        return component(content, wrapper)
    return dict(content)


# ---- components


def component(state, prefix):
    """The entries of `state` whose names begin with `prefix`, without it."""
    return {
        name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)
    }


def averaged_name(name):
    """Under which a latent-diffusion checkpoint keeps the average of the U-Net parameter `name`:
    without dots."""
    return AVERAGED + f"diffusion_model.{name}".replace(".", "")


def averaged(state, names, *, source):
    """The averaged weights of the U-Net parameters `names` in a latent-diffusion checkpoint; all or
    none."""
    dotless = {name: averaged_name(name) for name in names}
    assert len(set(dotless.values())) == len(dotless), "two names differ by their dots alone"
    missing = [name for name in dotless.values() if name not in state]
    if len(missing) == len(dotless):
        raise ValueError(
            f"{source} has no averaged weights ({AVERAGED}*), and the model YAML asks for them "
            "with "
            "weights: ema; go on with the others by weights=raw, or get the checkpoint that has "
            "both"
        )
    if missing:
        raise ValueError(
            f"{source} lacks {_some(missing)} of the averaged weights of this network; {REMEDY}"
        )
    return {name: state[dotless[name]] for name in dotless}


def load_components(path, networks, *, weights="ema"):
    """Load every network of {"unet": net, "first_stage": net, "cond_stage": net} from the file at
    `path`, each strictly; whatever belongs to none of them is left alone.

    A file of one network alone has its names without prefix. `weights` says which set of the U-Net:
    "ema" (averaged) or "raw", where the file has both. Returns the file's scale factor of the
    latents, None if it has none. Raises ValueError in one sentence."""
    if weights not in ("ema", "raw"):
        raise ValueError(
            unknown_word(f"weights '{weights}' is unknown", str(weights), ["ema", "raw"])
        )
    source, state = f"checkpoint {path}", load_state(path, ema=weights == "ema")
    for part, net in networks.items():
        found = component(state, PREFIXES[part])
        if (
            part == "unet"
            and weights == "ema"
            and (found or any(name.startswith(AVERAGED) for name in state))
        ):
            found = averaged(state, net.state_dict(), source=source)
        elif not found:
            if part != "unet" and any(name.startswith(tuple(PREFIXES.values())) for name in state):
                raise ValueError(f"{source} has no {part} ({PREFIXES[part]}*); {seems(state)}")
            found = {
                name: value
                for name, value in state.items()
                # `loss.`: training of a first stage
                if not name.startswith((*PREFIXES.values(), "loss."))
            }
        elif part == "unet" and any(name.startswith(AVERAGED) for name in state):
            print(
                f"{source}: raw weights are used; weights=ema takes the averaged ones, which it "
                "has too",
                flush=True,
            )
        load_weights(net, found, source if len(networks) == 1 else f"the {part} of {source}")
    return float(state["scale_factor"]) if "scale_factor" in state else None


REMEDY = "give the checkpoint that belongs to the model YAML, or correct its network options"


def load_weights(net, state, source):
    """Copy `state` into `net`, every key and shape checked, in the dtype of the network; returns
    `net`.

    `source` names the checkpoint in messages. Raises ValueError for missing, surplus, misshapen or
    non-finite weights and leaves `net` as it was."""
    own, state = (
        {name: value for name, value in weights.items() if not name.endswith(CONSTANT)}
        for weights in (net.state_dict(), state)
    )
    shared = [name for name in own if name in state]
    faults = {
        "misses": [name for name in own if name not in state],
        "has surplus": [name for name in state if name not in own],
        "has misshapen": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            for name in shared
            if state[name].shape != own[name].shape
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"it {fault} {_some(names)}" for fault, names in faults.items() if names)
        raise ValueError(
            f"{source} does not fit the network: {found}; {seems(state, own)}; {REMEDY}"
        )
    broken = [name for name in own if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(
            f"{source} has NaN or infinite weights in {_some(broken)}; it is unusable, get "
            "another copy"
        )
    net.load_state_dict({name: state[name].to(own[name].dtype) for name in own}, strict=False)
    return net


def seems(state, own=None):
    """What the weights look like by their names, and the network's `own` if that is something
    else."""
    found, expected = (
        next(
            (kind for kind, pattern in KINDS.items() if any(re.match(pattern, n) for n in names)),
            "",
        )
        for names in (state, own or ())
    )
    if not found:
        return "the file is of no known kind"
    if found == expected:
        return f"both seem to be {found}"
    return f"the file seems to be {found}" + (f" and the network {expected}" if expected else "")


def _some(names):
    listed = ", ".join(names[:SHOWN])
    return f"{len(names)} ({listed}{', ...' if len(names) > SHOWN else ''})"


def state_hash(*nets):
    """Hexadecimal SHA-256 over names and bytes of the state dicts in their order: equal for equal
    weights."""
    digest = hashlib.sha256()
    for net in nets:
        for name, value in net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

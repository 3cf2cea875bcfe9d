"""Loading networks from checkpoints: which component and weights; all names and shapes checked."""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from base.errors import unknown_word
from models.checkpoint_files import PREFIXES, component, load_state
from models.kinds import abridge, compare_kinds

State = dict[str, torch.Tensor]
AVERAGED = "model_ema."
CONSTANT = "position_ids"  # in some files a weight, though it only counts 0, 1, 2, ...
REMEDY = "give the checkpoint that belongs to the model YAML, or correct its network options"


def averaged_name(name: str) -> str:
    """Returns the name under which a latent-diffusion checkpoint keeps the average of the U-Net
    parameter `name`: without dots."""
    return AVERAGED + f"diffusion_model.{name}".replace(".", "")


def take_averaged(state: State, names: Iterable[str], *, source: str) -> State:
    """Takes the averaged weights of the U-Net parameters `names` from a latent-diffusion
    checkpoint. Raises ValueError if one is missing."""
    dotless = {name: averaged_name(name) for name in names}
    assert len(set(dotless.values())) == len(dotless), "two names differ by their dots alone"
    missing = [name for name in dotless.values() if name not in state]
    if len(missing) == len(dotless):
        raise ValueError(
            f"{source} has no averaged weights ({AVERAGED}*), and the model YAML asks for them "
            "with weights: ema; go on with the others by weights=raw, or get the checkpoint that "
            "has both"
        )
    if missing:
        raise ValueError(
            f"{source} lacks {abridge(missing)} of the averaged weights of this network; {REMEDY}"
        )
    return {name: state[dotless[name]] for name in dotless}


def load_components(
    path: Path | str, networks: dict[str, nn.Module], *, weights: str = "ema"
) -> float | None:
    """Loads every network of {"unet": net, "first_stage": net, "cond_stage": net} from the file at
    `path`, each strictly; whatever belongs to none of them is left alone.

    A file of one network alone has its names without prefix. `weights` says which set of the U-Net:
    "ema" (averaged) or "raw", where the file has both. Returns the file's scale factor of the
    latents, None if it has none. Raises ValueError in one sentence."""
    if weights not in ("ema", "raw"):
        complaint = f"weights '{weights}' is unknown"
        raise ValueError(unknown_word(complaint, str(weights), ["ema", "raw"]))
    source, state = f"checkpoint {path}", load_state(path, ema=weights == "ema")
    for part, net in networks.items():
        found = _find_component(state, part, net, weights, source)
        load_weights(net, found, source if len(networks) == 1 else f"the {part} of {source}")
    return float(state["scale_factor"]) if "scale_factor" in state else None


def _find_component(state, part, net, weights, source):
    """The weights of one part in a checkpoint of several, or those of a file of one network."""
    found = component(state, PREFIXES[part])
    has_both = part == "unet" and any(name.startswith(AVERAGED) for name in state)
    if part == "unet" and weights == "ema" and (found or has_both):
        return take_averaged(state, net.state_dict(), source=source)
    if found:
        if has_both:
            logging.getLogger("tinydm").info(
                f"{source}: raw weights are used; weights=ema takes the averaged ones, which it "
                "has too"
            )
        return found
    others = tuple(PREFIXES.values())
    if part != "unet" and any(name.startswith(others) for name in state):
        raise ValueError(f"{source} has no {part} ({PREFIXES[part]}*); {compare_kinds(state)}")
    unwanted = (*others, "loss.")  # `loss.`: training of a first stage
    return {name: value for name, value in state.items() if not name.startswith(unwanted)}


def load_weights(net: nn.Module, state: State, source: str) -> nn.Module:
    """Copies `state` into `net`, every key and shape checked, in the dtype of the network; returns
    `net`.

    `source` names the checkpoint in messages. Raises ValueError for missing, surplus, misshapen or
    non-finite weights and leaves `net` as it was."""
    wanted, state = map(_without_constants, (net.state_dict(), state))
    shared = [name for name in wanted if name in state]
    shapes = {name: (tuple(state[name].shape), tuple(wanted[name].shape)) for name in shared}
    faults = {
        "misses": [name for name in wanted if name not in state],
        "has surplus": [name for name in state if name not in wanted],
        "has misshapen": [f"{n} {a} instead of {b}" for n, (a, b) in shapes.items() if a != b],
    }
    if any(faults.values()):
        named = [f"it {fault} {abridge(names)}" for fault, names in faults.items() if names]
        found = "; ".join(named)
        raise ValueError(
            f"{source} does not fit the network: {found}; {compare_kinds(state, wanted)}; {REMEDY}"
        )
    broken = [name for name in wanted if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(
            f"{source} has NaN or infinite weights in {abridge(broken)}; it is unusable, get "
            "another copy"
        )
    cast = {name: state[name].to(value.dtype) for name, value in wanted.items()}
    net.load_state_dict(cast, strict=False)
    return net


def _without_constants(weights):
    return {name: value for name, value in weights.items() if not name.endswith(CONSTANT)}


def state_hash(*nets: nn.Module) -> str:
    """The hexadecimal SHA-256 of names and bytes of the state dicts, in their order."""
    digest = hashlib.sha256()
    for net in nets:
        for name, value in net.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

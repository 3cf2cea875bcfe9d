"""What each key of a recipe decides, hence when two recipes are one. What decides the images of the
full-precision model also decides the trajectories that calibration data are picked from; what
decides these, the calibration set; what decides that, the quantized network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.config import flatten

if TYPE_CHECKING:
    from models.diffusion import DiffusionModel
    from tinydm.recipe import RunConfig

IMAGES, TRAJECTORIES, CALIBRATION, NETWORK = "images", "trajectories", "calibration", "network"
NOTHING = "nothing"
# the keys of tinydm.recipe.RunConfig by what they decide; one stands for all keys below it that are
# not listed themselves
_KEYS = {
    IMAGES: "network first_stage cond_stage scale_factor guidance checkpoint weights schedule "
    "sampling",
    TRAJECTORIES: "calibration.images calibration.seed calibration.start calibration.start_step "
    "calibration.data",
    CALIBRATION: "calibration",
    NETWORK: "name bits method segments rules exceptions passes pass_options preset effort seed "
    "max_batch",
    NOTHING: "download demo variant sampling.num evaluation out device threads memory_gb disk_gb "
    "force provenance",
}
# what scores are made under, beside the model and the device
SCORED_BY = "method bits weights sampling schedule guidance evaluation provenance".split()
DECIDES = {key: what for what, keys in _KEYS.items() for key in keys.split()}


def decides(key: str, table: dict[str, str] = DECIDES) -> str:
    """Looks up what a dotted key decides. Raises KeyError for one that no entry stands for."""
    while key not in table and "." in key:
        key = key.rpartition(".")[0]
    return table[key]


def select(
    tree: dict[str, Any], what: Sequence[str], table: dict[str, str] = DECIDES, above: str = ""
) -> dict[str, Any]:
    """Keeps those keys of a nested dict, which stands below `above`, that decide one of `what`."""
    kept = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and any(entry.startswith(f"{name}.") for entry in table):
            below = select(value, what, table, f"{name}.")
            kept |= {key: below} if below else {}
        elif decides(name, table) in what:
            kept[key] = value
    return kept


def identity(config: RunConfig) -> dict[str, Any]:
    """Returns all that tells a RunConfig from another: what decides nothing is left out."""
    return select(asdict(config), (IMAGES, TRAJECTORIES, CALIBRATION, NETWORK))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Names the keys that decide something and differ in two RunConfigs, with both values. What is
    left to the machine in one, effort.dtype, is as the other says."""
    a, b = a.with_dtype(b.effort.dtype), b.with_dtype(a.effort.dtype)
    a, b = flatten(identity(a)), flatten(identity(b))
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key} ({a.get(key)} there, {b.get(key)} here)" for key in keys]


def recipe_of(config: RunConfig, weights_hash: str, rules: list) -> dict[str, Any]:
    """Returns what a quantized file stores: all that decides the network, which is converted by
    `rules`, and all that sampling with it needs beside the checkpoint."""
    recipe = identity(config) | {"passes": config.all_passes, "rules": rules}
    del recipe["exceptions"], recipe["pass_options"]  # `rules` and `passes` say these
    return recipe | {"weights_hash": weights_hash}


def images_of(config: RunConfig, model: DiffusionModel, seed: int) -> dict[str, Any]:
    """Returns what decides the bytes of full-precision images and trajectories of `seed`. The hash
    of the weights stands for the checkpoint, that of the prompts for their file."""
    decisive = select(asdict(config), (IMAGES,))
    sampling, prompts = decisive.pop("sampling"), Path(config.sampling.prompts)
    del decisive["checkpoint"]
    return {
        **decisive,
        **sampling,
        "seed": seed,
        "weights": model.weights_hash,
        "device": model.device.type,
        "prompts": hashlib.sha256(prompts.read_bytes()).hexdigest() if prompts.is_file() else "",
    }


def folder_name(kind: str, content: dict[str, Any]) -> str:
    """Names a folder that runs share by what decides its content: KIND-12345678."""
    text = json.dumps(content, sort_keys=True)
    return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def scoring_protocol(config: RunConfig, device: str) -> dict[str, Any]:
    """Returns what scores are made under; where it differs they are made again."""
    everything = asdict(config)
    asked = {key: everything[key] for key in SCORED_BY}
    return {"model": config.name, **asked, "device": device}

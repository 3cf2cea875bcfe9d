"""What each key of a recipe decides, hence when two recipes are one.

What decides the full-precision model's images also decides the trajectories that calibration data
are picked from; what decides these, the calibration set; what decides that, the quantized
network."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.config import flatten

if TYPE_CHECKING:
    from models.diffusion import DiffusionModel
    from tinydm.recipe import RunConfig

IMAGES, TRAJECTORIES, CALIBRATION, NETWORK = "images", "trajectories", "calibration", "network"
NOTHING = "nothing"
# A key of tinydm.recipe.RunConfig -> what it decides, and with it all keys below that are not
# listed themselves.
DECIDES = {
    "name": NETWORK,
    "network": IMAGES,
    "first_stage": IMAGES,
    "cond_stage": IMAGES,
    "scale_factor": IMAGES,
    "guidance": IMAGES,
    "checkpoint": IMAGES,
    "weights": IMAGES,
    "download": NOTHING,
    "demo": NOTHING,
    "schedule": IMAGES,
    "bits": NETWORK,
    "method": NETWORK,
    "variant": NOTHING,
    "segments": NETWORK,
    "rules": NETWORK,
    "exceptions": NETWORK,
    "passes": NETWORK,
    "pass_options": NETWORK,
    "preset": NETWORK,
    "effort": NETWORK,
    "calibration": CALIBRATION,
    "calibration.images": TRAJECTORIES,
    "calibration.seed": TRAJECTORIES,
    "calibration.start": TRAJECTORIES,
    "calibration.start_step": TRAJECTORIES,
    "calibration.data": TRAJECTORIES,
    "sampling": IMAGES,
    "sampling.num": NOTHING,
    "evaluation": NOTHING,
    "seed": NETWORK,
    "out": NOTHING,
    "device": NOTHING,
    "threads": NOTHING,
    "memory_gb": NOTHING,
    "max_batch": NETWORK,
    "force": NOTHING,
    "provenance": NOTHING,
}


def decides(key: str, table: dict[str, str] = DECIDES) -> str:
    """Looks up what a dotted key decides. Raises KeyError for one that no entry stands for."""
    while key not in table and "." in key:
        key = key.rpartition(".")[0]
    return table[key]


def select(
    tree: dict[str, Any], what: Iterable[str], table: dict[str, str] = DECIDES
) -> dict[str, Any]:
    """Keeps those keys of a nested dict that decide one of `what`."""
    return _select(tree, set(what), table, "")


def _select(tree, what, table, above):
    kept = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        if isinstance(value, dict) and any(entry.startswith(f"{name}.") for entry in table):
            below = _select(value, what, table, f"{name}.")
            kept |= {key: below} if below else {}
        elif decides(name, table) in what:
            kept[key] = value
    return kept


def identity(config: RunConfig) -> dict[str, Any]:
    """Returns all that tells a RunConfig from another: what decides nothing is left out."""
    return select(asdict(config), (IMAGES, TRAJECTORIES, CALIBRATION, NETWORK))


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Names the keys that decide something and on which two RunConfigs disagree, with both
    values."""
    a, b = flatten(identity(a)), flatten(identity(b))
    return [
        f"{key} ({a.get(key)} there, {b.get(key)} here)"
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    ]


def recipe_of(config: RunConfig, weights_hash: str, rules: list) -> dict[str, Any]:
    """Returns what a quantized file stores: all that decides the network, which is converted by
    `rules`, and all that sampling with it needs beside the checkpoint."""
    recipe = identity(config) | {"passes": config.all_passes, "rules": rules}
    # `rules` and `passes` say these
    del recipe["exceptions"], recipe["pass_options"]
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
    keys = ("method", "bits", "weights", "sampling", "schedule", "guidance", "evaluation")
    return {
        "model": config.name,
        **{key: everything[key] for key in (*keys, "provenance")},
        "device": device,
    }

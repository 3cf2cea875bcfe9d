"""What image number i is asked to show: a class or a prompt, chosen by (seed, index), encoded for
the network."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from base.seeds import mix


@dataclass
class Condition:
    """`choose(seed, index)` names a class or a prompt, `encode(list of those)` gives what the
    network takes (N, ...): labels, or a context (N, tokens, D). `null` is the class or prompt that
    stands for none, where there is one."""

    choose: Callable
    encode: Callable
    null: Any = None

    def rows(self, seed, indices):
        return self.encode([self.choose(seed, i) for i in indices])

    def null_row(self):
        return self.encode([self.null])


def by_class(num_classes, encode, *, wanted=(), null=None):
    """Classes `wanted` in turn; without them one drawn for each image from all but `null`. Raises
    ValueError for a class that does not exist."""
    for number in wanted:
        if not 0 <= number < num_classes:
            raise ValueError(
                f"class {number} in sampling.classes does not exist; this model has 0 to "
                f"{num_classes - 1}"
            )
    classes = list(wanted) or [c for c in range(num_classes) if c != null]

    def choose(seed, index):
        return (
            classes[index % len(classes)]
            if wanted
            else classes[mix(seed + 2**32, index) % len(classes)]
        )

    return Condition(choose, encode, null)


def by_prompt(prompts, encode, *, sampling_seed=0, null=""):
    """Prompt i, again from the first after the last. Other seeds than that of sampling,
    calibration's, take them from the last on, so that what is measured is not what was calibrated
    with, as long as there are enough."""
    return Condition(
        lambda seed, index: prompts[
            (index if seed == sampling_seed else -1 - index) % len(prompts)
        ],
        encode,
        null,
    )


def read_prompts(path):
    """Prompts of a text file (one a line) or of a COCO captions file (.json; the first caption of
    every image, in the order of image ids). Raises ValueError for a file that holds none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"the file of prompts '{path}' does not exist; name a text file with one prompt a "
            "line or a "
            "COCO captions .json with sampling.prompts=PATH"
        )
    if path.suffix == ".json":
        try:
            captions = {}
            for entry in json.loads(path.read_text())["annotations"]:
                captions.setdefault(entry["image_id"], entry["caption"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no COCO captions file ({error}); expected 'annotations' with "
                "'image_id' and "
                "'caption'"
            ) from None
        prompts = [captions[i].strip() for i in sorted(captions)]
    else:
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def build_condition(net, cond_stage, sampling, guidance):
    """The condition of a network: None where it takes none.

    `cond_stage` encodes classes (ClassEmbedder) or prompts (TextEncoder); a network with
    `num_classes` takes labels as they are. `sampling` has `classes` and `prompts`, `guidance` has
    `null_class` and `null_prompt`."""
    null, wanted = guidance.get("null_class"), sampling.get("classes", ())
    device = next(net.parameters()).device
    if cond_stage is None:
        num_classes = getattr(net, "num_classes", None)
        if num_classes is None:
            return None
        return by_class(
            num_classes,
            lambda labels: torch.tensor(labels, device=device),
            null=null,
            wanted=wanted,
        )
    if hasattr(cond_stage, "tokenize"):
        if not sampling.get("prompts"):
            raise ValueError(
                "this model draws what a prompt says; give a file with sampling.prompts=PATH (one "
                "prompt "
                "a line, or COCO captions .json)"
            )
        encode = torch.no_grad()(
            lambda prompts: cond_stage(cond_stage.tokenize(prompts).to(device))
        )
        return by_prompt(
            read_prompts(sampling["prompts"]),
            encode,
            sampling_seed=sampling.get("seed", 0),
            null=guidance.get("null_prompt") or "",
        )
    encode = torch.no_grad()(lambda labels: cond_stage(torch.tensor(labels, device=device)))
    return by_class(cond_stage.embedding.num_embeddings, encode, null=null, wanted=wanted)

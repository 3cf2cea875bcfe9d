"""What an image is asked to show: a class or prompt, by (seed, index), as networks take it."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.seeds import mix

Encode = Callable[[list[Any]], torch.Tensor]


@dataclass
class Condition:
    """What images are asked to show. `choose(seed, index)` names a class or a prompt,
    `encode(list of those)` gives what the network takes (N, ...): labels, or a context (N, tokens,
    D). `null` is the class or prompt that stands for none, where there is one."""

    choose: Callable[[int, int], Any]
    encode: Encode
    null: Any = None

    def rows(self, seed: int, indices: Iterable[int]) -> torch.Tensor:
        """Encodes what the images `indices` of a seed show, (N, ...)."""
        return self.encode([self.choose(seed, i) for i in indices])

    def null_row(self) -> torch.Tensor:
        """What stands for no condition, encoded once, (1, ...)."""
        return self._null_row

    @cached_property
    def _null_row(self):
        return self.encode([self.null])


def by_class(
    num_classes: int, encode: Encode, *, wanted: Sequence[int] = (), null: int | None = None
) -> Condition:
    """Takes the classes `wanted` in turn; without them it draws one for each image from all but
    `null`. Raises ValueError for a class that does not exist."""
    for number in wanted:
        if not 0 <= number < num_classes:
            raise ValueError(
                f"class {number} in sampling.classes does not exist; this model has 0 to "
                f"{num_classes - 1}"
            )
    classes = list(wanted) or [c for c in range(num_classes) if c != null]

    def choose(seed, index):
        number = index if wanted else mix(seed + 2**32, index)
        return classes[number % len(classes)]

    return Condition(choose, encode, null)


def by_prompt(
    prompts: list[str], encode: Encode, *, sampling_seed: int = 0, null: str = ""
) -> Condition:
    """Takes the prompts in turn. Other seeds than that of sampling, calibration's, take them from
    the last on: with enough prompts none is measured that was calibrated with."""

    def choose(seed, index):
        number = index if seed == sampling_seed else -1 - index
        return prompts[number % len(prompts)]

    return Condition(choose, encode, null)


def read_prompts(path: Path | str) -> list[str]:
    """Reads the prompts of a text file (one a line) or of a COCO captions .json (the first caption
    of every image, in the order of image ids). Raises ValueError for a file that holds none."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"the file of prompts '{path}' does not exist; name a text file with one prompt a "
            "line or a COCO captions .json with sampling.prompts=PATH"
        )
    if path.suffix == ".json":
        try:
            captions = {}
            for entry in json.loads(path.read_text())["annotations"]:
                captions.setdefault(entry["image_id"], entry["caption"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no COCO captions file ({error}); expected 'annotations' with "
                "'image_id' and 'caption'"
            ) from None
        prompts = [captions[i].strip() for i in sorted(captions)]
    else:
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompts")
    return prompts


def build_condition(
    net: nn.Module, cond_stage: nn.Module | None, sampling: dict[str, Any], guidance: dict[str, Any]
) -> Condition | None:
    """Builds the condition of a network: None where it takes none.

    `cond_stage` encodes classes (ClassEmbedder) or prompts (TextEncoder); a network with
    `num_classes` takes labels as they are. `sampling` has `classes` and `prompts`, `guidance` has
    `null_class` and `null_prompt`."""
    null, wanted = guidance.get("null_class"), sampling.get("classes", ())
    device = next(net.parameters()).device
    if cond_stage is None:
        num_classes = getattr(net, "num_classes", None)
        if num_classes is None:
            return None
        take_labels = partial(torch.tensor, device=device)
        return by_class(num_classes, take_labels, null=null, wanted=wanted)
    if hasattr(cond_stage, "tokenize"):
        if not sampling.get("prompts"):
            raise ValueError(
                "this model draws what a prompt says; give a file with sampling.prompts=PATH (one "
                "prompt a line, or COCO captions .json)"
            )

        @torch.no_grad()
        def encode(prompts):
            return cond_stage(cond_stage.tokenize(prompts).to(device))

        prompts, seed = read_prompts(sampling["prompts"]), sampling.get("seed", 0)
        null = guidance.get("null_prompt") or ""
        return by_prompt(prompts, encode, sampling_seed=seed, null=null)

    @torch.no_grad()
    def embed(labels):
        return cond_stage(torch.tensor(labels, device=device))

    return by_class(cond_stage.embedding.num_embeddings, embed, null=null, wanted=wanted)

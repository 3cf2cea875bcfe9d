"""What samples are scored against: the images of a reference or their statistics alone."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from base.files import sha256
from evaluation.extractors.extractor import Extractor
from evaluation.extractors.features import Source
from evaluation.references.frechet import Statistics, read_statistics, statistics_of
from models.data import image_files, load_images

MIN_IMAGES = 100  # ten splits of ten for IS, and neighbourhoods that mean something


@dataclass
class Reference:
    """Features of the reference as far as there are any, and what the protocol says of it."""

    protocol: dict[str, Any]
    pooled: torch.Tensor | None = None  # (M, D)
    statistics: dict[str, Statistics] = field(default_factory=dict)  # by kind of features

    def fewest(self, samples: torch.Tensor) -> int:
        """The number of images of the smaller set: the samples' features (N, D), or this one."""
        return len(samples) if self.pooled is None else min(len(samples), len(self.pooled))


def find_reference(
    net: Extractor, reference: str, size: str, extract: Callable[[Source], dict[str, Any]]
) -> Reference:
    """The reference that `reference` names: a folder of images, or "cifar10-train[:FOLDER]", whose
    features come from `extract`; "" means the statistics that ship with the extractor `net`, if
    any. `size` ("WxH") is that of the samples. Raises ValueError for images of another size, for
    fewer than MIN_IMAGES, and for statistics of other weights."""
    if not reference:
        return _shipped(net)
    if reference.split(":")[0] == "cifar10-train":
        source, _ = load_images(reference.replace("cifar10-train", "cifar10", 1), "train")
        reference = "cifar10-train"
    else:
        folder = Path(reference)
        source = image_files(folder / "train" if (folder / "train").is_dir() else folder)
    real = extract(source)
    if real["size"] != size:
        raise ValueError(
            f"samples are {size} but the reference {reference} is {real['size']}; prepare the "
            "reference the way the training images were"
        )
    if len(source) < MIN_IMAGES:
        raise ValueError(
            f"the reference {reference} holds {len(source)} images but at least {MIN_IMAGES} are "
            "needed; add images"
        )
    protocol = _describe(reference, len(source), real["sha256"])
    return Reference(protocol, real["pooled"], statistics_of(real))


def _shipped(net: Extractor) -> Reference:
    if not net.statistics:
        return Reference(_describe(None, 0, None))
    statistics, pooled, metadata = read_statistics(net.statistics)
    if metadata["extractor_sha256"] != sha256(net.weights):
        raise ValueError(
            f"{net.statistics.name} was made with other weights than {net.weights.name}; make both "
            "again with python scripts/package_classifier.py"
        )
    name = f"{net.statistics.name} ({metadata['split']}; {metadata['note']})"
    protocol = _describe(name, metadata["count"], sha256(net.statistics))
    return Reference(protocol, pooled, statistics)


def _describe(name: str | None, count: int, digest: str | None) -> dict[str, Any]:
    return {"reference": name, "reference_count": count, "reference_sha256": digest}

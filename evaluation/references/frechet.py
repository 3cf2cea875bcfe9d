"""Reference statistics and the Frechet distance to them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch_fidelity import metric_fid

from base.files import PROJECT, Tensors, load_tensors, save_tensors

STATISTICS = PROJECT / "models/weights/cifar10-classifier-stats.safetensors"
KEPT = 10_000  # images, evenly picked, whose features are kept for precision, recall, KID
SUFFIX = {"pooled": "", "spatial": "_s"}  # features -> of the names mu and sigma in the file

Statistics = dict[str, np.ndarray]  # {"mu": (D,), "sigma": (D, D)}, float64


def statistics_of(features: Tensors) -> dict[str, Statistics]:
    """Mean and covariance of the pooled and of the spatial features (N, D) -> {"pooled" and
    "spatial": {"mu" (D,), "sigma" (D, D)}}, float64."""
    return {kind: mean_and_covariance(features[kind]) for kind in SUFFIX}


def mean_and_covariance(features: torch.Tensor) -> Statistics:
    """Those of features (N, D) -> {"mu" (D,), "sigma" (D, D)}, float64."""
    return metric_fid.fid_features_to_statistics(features.double())


def write_statistics(path: Path | str, features: Tensors, metadata: dict[str, Any]) -> None:
    """Write statistics of `features`, with `metadata` in the file's header."""
    tensors = {}
    for kind, statistics in statistics_of(features).items():
        for name, value in statistics.items():
            tensors[name + SUFFIX[kind]] = torch.from_numpy(value)
    # sFD does not need the digits, nor do neighbours
    tensors["sigma_s"] = tensors["sigma_s"].float()
    pooled = features["pooled"]
    tensors["features"] = pooled[:: max(1, len(pooled) // KEPT)][:KEPT].half()
    save_tensors(path, tensors, metadata)


def read_statistics(
    path: Path | str = STATISTICS,
) -> tuple[dict[str, Statistics], torch.Tensor, dict[str, Any]]:
    """Read a file of `write_statistics` -> statistics, kept pooled features (K, D), metadata."""
    tensors, metadata = load_tensors(path)
    if not metadata or not {"mu", "sigma", "mu_s", "sigma_s", "features"} <= tensors.keys():
        raise ValueError(
            f"{path} is not a file of reference statistics; restore it from the repository or "
            "make it with python scripts/package_classifier.py"
        )
    statistics = {
        kind: {name: tensors[name + suffix].double().numpy() for name in ("mu", "sigma")}
        for kind, suffix in SUFFIX.items()
    }
    return statistics, tensors["features"].float(), metadata


def frechet_distance(statistics_a: Statistics, statistics_b: Statistics) -> float:
    """|mu_a - mu_b|^2 + trace(sigma_a + sigma_b - 2 (sigma_a sigma_b)^(1/2))."""
    found = metric_fid.fid_statistics_to_metric(statistics_a, statistics_b, verbose=False)
    return found[metric_fid.KEY_METRIC_FID]

"""Reference statistics and the Frechet distance to them."""

import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from base.files import PROJECT, load_tensors, save_tensors

STATISTICS = PROJECT / "models/weights/cifar10-classifier-stats.safetensors"
# images, evenly picked, whose features are kept for precision, recall, KID
KEPT = 10_000
SUFFIX = {"pooled": "", "spatial": "_s"}  # features -> of the names mu and sigma in the file


def statistics_of(features):
    """-> {"pooled" and "spatial": {"mu" (D,), "sigma" (D, D)}}: mean and covariance of features (N,
    D), float64."""
    return {kind: fid_features_to_statistics(features[kind].double()) for kind in SUFFIX}


def write_statistics(path, features, facts):
    """Statistics of `features`, with `facts` in the file's metadata."""
    tensors = {
        name + SUFFIX[kind]: torch.from_numpy(value)
        for kind, statistics in statistics_of(features).items()
        for name, value in statistics.items()
    }
    # sFD does not need the digits, nor do neighbours
    tensors["sigma_s"] = tensors["sigma_s"].float()
    tensors["features"] = features["pooled"][:: max(1, len(features["pooled"]) // KEPT)][
        :KEPT
    ].half()
    save_tensors(path, tensors, facts)


def read_statistics(path=STATISTICS):
    """-> what statistics_of gave, the kept pooled features (K, D), the facts stored with them."""
    tensors, facts = load_tensors(path)
    if not facts or not {"mu", "sigma", "mu_s", "sigma_s", "features"} <= tensors.keys():
        raise ValueError(
            f"{path} is not a file of reference statistics; restore it from the repository or "
            "make it "
            "with python scripts/package_classifier.py"
        )
    return (
        {
            kind: {name: tensors[name + suffix].double().numpy() for name in ("mu", "sigma")}
            for kind, suffix in SUFFIX.items()
        },
        tensors["features"].float(),
        facts,
    )


def frechet_distance(statistics_a, statistics_b):
    return fid_statistics_to_metric(statistics_a, statistics_b, verbose=False)[KEY_METRIC_FID]

"""FD and sFD: Frechet distances of pooled and of spatial features."""

from typing import Any

from evaluation.references.frechet import frechet_distance, mean_and_covariance
from evaluation.references.images import Reference
from evaluation.scores.score import Score

DISTANCES = {"FD": "pooled", "sFD": "spatial"}  # by name, and their features


def frechet_distances(samples: dict[str, Any], reference: Reference) -> Score:
    """Each needs more images than features for a covariance of full rank."""
    found, fewest = Score(), reference.fewest(samples["pooled"])
    for name, kind in DISTANCES.items():
        features = samples[kind]
        if kind not in reference.statistics:
            found.left_out[name] = (
                f"no reference of {kind} features was given: evaluation.reference=FOLDER or "
                "evaluation.reference=cifar10-train"
            )
        elif fewest <= features.shape[1]:
            size = features.shape[1]
            reason = f"{fewest} images cannot give a covariance of {size} features full rank"
            found.left_out[name] = reason
        else:
            statistics = mean_and_covariance(features)
            found.values[name] = frechet_distance(statistics, reference.statistics[kind])
    return found


def distance_to_float(quantized: dict[str, Any], original: dict[str, Any]) -> dict[str, float]:
    """The Frechet distance between the images themselves of two results of `distribution_scores`
    -> {"FID to FP32": number}, or of whichever distance both hold; {} where there are too few
    images. It needs no reference and is 0 for equal images, where the FD to a reference can fall by
    an error that happens to please it."""
    names = [name for name in quantized["scores"] if name.split("-")[0] in ("FID", "FD")]
    if not names:
        return {}
    a, b = (mean_and_covariance(found["features"]) for found in (quantized, original))
    return {f"{name} to FP32": frechet_distance(a, b) for name in names}

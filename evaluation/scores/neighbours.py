"""Precision, recall and KID: scores that compare samples with single images of a reference."""

from typing import Any

from torch_fidelity import metric_kid
from torch_fidelity.metric_prc import prc_features_to_metric

from evaluation.references.images import Reference
from evaluation.scores.score import Score

KID_SUBSET_SIZE = 1000  # torch-fidelity's default; smaller sets are used whole (see the protocol)


def neighbour_scores(samples: dict[str, Any], reference: Reference) -> Score:
    """All need the pooled features of single images of a reference."""
    pooled, real = samples["pooled"], reference.pooled
    if real is None:
        reason = "they need the images of a reference: evaluation.reference=FOLDER"
        protocol = {"neighbours_among": None, "kid_subset_size": None}
        return Score(left_out={"KID, precision, recall": reason}, protocol=protocol)
    by_blocks = {"save_cpu_ram": True, "prc_batch_size": 2000}
    prc = prc_features_to_metric(pooled, real, **by_blocks, verbose=False)
    size = min(KID_SUBSET_SIZE, reference.fewest(pooled))
    kid = metric_kid.kid_features_to_metric(pooled, real, kid_subset_size=size, verbose=False)
    values = {
        "precision": prc["precision"],
        "recall": prc["recall"],
        "KID": kid[metric_kid.KEY_METRIC_KID_MEAN],
        "KID-std": kid[metric_kid.KEY_METRIC_KID_STD],
    }
    return Score(values, protocol={"neighbours_among": len(real), "kid_subset_size": size})

"""IS: the Inception score of logits."""

from typing import Any

from torch_fidelity import metric_isc

from evaluation.references.images import Reference
from evaluation.scores.score import Score


def inception_score(samples: dict[str, Any], reference: Reference) -> Score:
    """Mean and deviation over ten splits. It needs no reference."""
    found = metric_isc.isc_features_to_metric(samples["logits"])
    mean, std = metric_isc.KEY_METRIC_ISC_MEAN, metric_isc.KEY_METRIC_ISC_STD
    return Score({"IS": found[mean], "IS-std": found[std]}, protocol={"is_splits": 10})

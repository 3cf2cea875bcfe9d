"""IS: the Inception score of logits."""

from typing import Any

from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)

from evaluation.references.images import Reference
from evaluation.scores.score import Score


def inception_score(samples: dict[str, Any], reference: Reference) -> Score:
    """Mean and deviation over ten splits. It needs no reference."""
    found = isc_features_to_metric(samples["logits"])
    values = {"IS": found[KEY_METRIC_ISC_MEAN], "IS-std": found[KEY_METRIC_ISC_STD]}
    return Score(values, protocol={"is_splits": 10})

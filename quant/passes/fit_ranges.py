"""Ranges of weights and activations from the calibration set."""

from quant.network import input_quantizers, quant_layers
from quant.observer import VALUES_PER_GROUP
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job


@quant_pass(moment=Moment.FIT, effort={"num_values": "num_values"})
def fit_ranges(
    job: Job,
    *,
    num_samples: int | None = 256,
    batch_size: int = 64,
    neighbours: int = 0,
    num_values: int = VALUES_PER_GROUP,
) -> Facts:
    """Choose every scale and zero point: weights from the weights, activations from `num_samples`
    calibration samples (None: all) through the full-precision network, `batch_size` at a time,
    which a moving average (`ema`) goes by. A search sees `num_values` values of each group at most.
    Where segments of time are short, each has few samples and misses outliers; those of the
    `neighbours` segments on either side then help."""
    job.need_float_weights("fit_ranges")
    job.fit_ranges(num_samples, batch_size, neighbours, num_values)
    weights = [m for m in quant_layers(job.net).values() if m.weight_quantizer is not None]
    inputs = input_quantizers(job.net)
    return [{"pass": "fit_ranges", "weights": len(weights), "inputs": len(inputs)}]

"""Ranges of weights and activations from the calibration set."""

import torch

from quant.network import in_full_precision, input_quantizers, quant_layers


@torch.no_grad()
def fit_ranges(job, *, num_samples=256, batch_size=64, neighbours=0):
    """Choose every scale and zero point: weights from the weights, activations from `num_samples`
    calibration samples (None: all) through the full-precision network, `batch_size` at a time,
    which a moving average (`ema`) goes by. Where segments of time are short, each has few samples
    and misses outliers; those of the `neighbours` segments on either side then help."""
    job.need_float_weights("fit_ranges")
    layers = [m for m in quant_layers(job.net).values() if m.weight_quantizer is not None]
    quantizers = input_quantizers(job.net).values()
    for layer in layers:
        layer.fit_weight()
    try:
        sample = job.calibration.subset(num_samples, job.net.timeline, job.seed)
        for q in quantizers:
            q.begin_observing(len(sample))
        with in_full_precision(job.net):
            for arguments in sample.batches(job.batch(batch_size)) if quantizers else ():
                job.net(*(a.to(job.device) for a in arguments))
        for q in quantizers:
            q.fit_observed(neighbours, batch_size)
    finally:
        for q in quantizers:
            q.observed = None
    return [{"pass": "fit_ranges", "weights": len(layers), "inputs": len(quantizers)}]

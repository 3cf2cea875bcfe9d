"""The rounding error of the network's input goes around the network (TinyDM).

The first layer reads x on a grid, x_q, but x itself is at hand where the sampler calls the network.
To first order

    eps(x) = eps(x_q) + J (x - x_q),      eps' = eps_q(x) + K(t) (x - x_q)

where K (outputs, C) stands for the Jacobian J: one matrix for every time segment, the same at every
pixel, the least squares fit of eps - eps_q by x - x_q. The network takes noise in x for noise and
answers with it: on latent-compact K is near the identity at the noisy steps and grows towards the
image. So the error of an 8-bit input reaches eps in full and, in a network whose weights are
reconstructed, is most of what is left of its error. The product costs C multiply-adds a pixel and
output channel, in floating point.

Axes: N samples, C channels of x, S time segments.
"""

import torch

from quant.network import Bypass, stem_of
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job

RIDGE = 1e-6  # share of the mean variance of x - x_q


@quant_pass(
    moment=Moment.FINISH,
    once=True,
    measures=True,
    inside_segments="it fits the finished network; list it after segment_models",
)
@torch.no_grad()
def bypass_input(job: Job, *, num_samples: int = 1024) -> Facts:
    """The pass: fit K by `num_samples` calibration samples, alike of every segment, to the network
    as it is then.

    Returns one fact: mean square of eps_q - eps before and after; none for an input in floating
    point, of which nothing is lost. Raises ValueError before fit_ranges, if the network has a
    bypass already, and for a time segment without samples."""
    job.need_ranges("bypass_input")
    if job.net.bypass is not None:
        raise ValueError("the network has a bypass of its input already; list bypass_input once")
    stem, timeline = stem_of(job.net), job.net.timeline
    if stem is None:
        reads = "the network reads its input in floating point"
        job.log(f"bypass_input: {reads}, nothing needs to go around it")
        return []
    calibration = job.calibration.spread(num_samples, timeline, job.seed)
    timeline.segment_times(calibration.t)  # says which segment has no samples
    segments = timeline.segments_of(calibration.t)
    gains, before, explained, values = [], 0.0, 0.0, 0
    for segment in range(timeline.num_segments):
        squares, products = 0, 0
        for arguments in calibration.rows(segments == segment).batches(job.batch(64)):
            arguments = [a.to(job.device) for a in arguments]
            error = pixels(job.model.net(*arguments) - job.net(*arguments))
            rounding = pixels(stem.input_error(arguments[0]))
            squares, products = squares + rounding.T @ rounding, products + error.T @ rounding
            before, values = before + float(error.square().sum()), values + error.numel()
        floor = (RIDGE * squares.diagonal().mean()).clamp(min=1e-30)
        squares = squares + floor * torch.eye(len(squares)).to(squares)
        gains.append(torch.linalg.solve(squares, products, left=False))
        explained += float((gains[-1] * products).sum())
    job.net.bypass = Bypass(timeline, len(gains[0]), stem.shape[1]).to(job.device)
    job.net.bypass.gain.copy_(torch.stack(gains))
    before, after = before / values, (before - explained) / values
    return [{"pass": "bypass_input", "mse_before": before, "mse_after": after}]


def pixels(x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N H W, C), float64."""
    return x.permute(0, 2, 3, 1).flatten(0, 2).double()

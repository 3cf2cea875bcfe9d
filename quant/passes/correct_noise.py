"""Correction of the noise that quantization adds to eps (PTQD, He et al. 2023, arXiv:2305.10657,
"Correlation disentanglement" and "Quantization noise correction").

At every time t the error d = eps_q - eps splits into a part that follows eps and a residual r of
mean b, per channel (PTQD) or for every row and column of a channel, as errors near the border
differ from those inside:
    d = k eps + r,    eps' = (eps_q - b) / (1 + k) = eps + (r - b) / (1 + k).
The sampler goes on with eps'. What is left of the error has the variance sigma_q^2 = var(r) / (1 +
k)^2, and a sampler that adds noise of its own adds that much less (ddim/sampler.py).

Axes: S times, N images, C channels of eps of H x W pixels.
"""

from typing import Literal

import torch

from base.network import batch_of
from quant.network import Correction, quant_layers
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job

# Lowest k that is corrected: PTQD; also of errors that shrink eps, as learning leaves them; none
SLOPES = {True: 0.0, "signed": -0.5, False: None}
# What is taken for the bias, from the sums of d and of r: (d, r) -> as these
BIASES = {
    "residual": lambda d, r: r,  # the paper
    "total": lambda d, r: d,  # the released code
    False: lambda d, r: 0 * d,
}
Axes = tuple[int, ...]
SUMMED = {"channel": (0, 2, 3), "line": (0,)}  # `per`: axes of eps to sum over


@quant_pass(
    moment=Moment.MEASURE,
    measures=True,
    inside_segments="it measures the finished network; list it after segment_models",
)
@torch.no_grad()
def correct_noise(
    job: Job,
    *,
    num_images: int = 1024,
    seed: int = 2000,
    slope: Literal[tuple(SLOPES)] = True,
    bias: Literal[tuple(BIASES)] = "residual",
    per: Literal[tuple(SUMMED)] = "channel",
    variance: bool = True,
) -> Facts:
    """The pass: measure k, b and sigma_q^2 at every time that the sampler visits, both networks on
    the full-precision trajectories of `num_images` images of `seed`, and give them to the quantized
    network as `correction`. `slope` (true: of errors that enlarge eps; signed; false), `bias`
    (residual, total or false), one `per` channel or per line of it, and `variance` say which parts
    are corrected; the others stay zero.

    The images had better not be those of the calibration set: on these a network that was fitted to
    them errs otherwise. The weights are hardened first. Returns one fact per time: k, mean |b|,
    sigma_q, and the mean square of eps_q - eps and of eps' - eps. Raises ValueError for no images.
    """
    if num_images < 1:
        raise ValueError(
            f"correct_noise cannot measure on {num_images} images; set num_images to 1 or more"
        )
    for layer in quant_layers(job.net).values():
        layer.harden()
    job.net.correction = None  # that of an earlier pass would be measured along
    totals, images, num_channels = {}, 0, job.model.shape[0]
    for step, t, x, cond, eps in job.trajectory(num_images, seed):
        eps_q = job.model.with_net(job.net).eps(x, batch_of(t, x), cond)
        e, d = eps[:, :num_channels], (eps_q - eps)[:, :num_channels]
        totals[t] = totals.get(t, 0) + sums(e, d, SUMMED[per])
        if step == 0:
            images += len(x)
            job.log(f"correct_noise: image {images} of {num_images}")
    fits = {t: fit(totals[t], slope, bias, variance) for t in sorted(totals)}
    correction = Correction(torch.tensor([*fits]), *next(iter(totals.values())).shape[1:])
    job.net.correction = correction.to(x.device)
    for name in ("slope", "rows", "columns", "variance"):
        getattr(correction, name).copy_(torch.stack([found[name] for found in fits.values()]))
    return [{"pass": "correct_noise", "t": t} | _numbers(found) for t, found in fits.items()]


def _numbers(found):
    bias, sigma = (found["rows"] + found["columns"]).abs().mean(), float(found["variance"]) ** 0.5
    numbers = {"slope": float(found["slope"]), "bias": float(bias), "sigma": sigma}
    return numbers | {key: float(found[key]) for key in ("mse_before", "mse_after")}


def sums(e: torch.Tensor, d: torch.Tensor, axes: Axes = SUMMED["channel"]) -> torch.Tensor:
    """Returns n, sum e, sum d, sum e d, sum e^2, sum d^2 over `axes` of eps e and its error d (N,
    C, H, W) -> (6, C, 1, 1) or (6, C, H, W) float64. Those of several batches add up."""
    e, d = e.double(), d.double()
    terms = (torch.ones_like(e), e, d, e * d, e * e, d * d)
    return torch.stack([term.sum(axes, keepdim=True)[0] for term in terms])


def fit(
    total: torch.Tensor, slope: bool | str, bias: bool | str, variance: bool
) -> dict[str, torch.Tensor]:
    """Returns the correction at one time from its `sums`, in closed form: k from the regression of
    d on eps over all elements; b nearest to the means of r, a number for every row plus one for
    every column; sigma_q^2 from the variance of r about these means."""
    n, e, d, ed, ee, dd = total
    k = n.new_zeros(())
    if slope:
        covariance = ed.sum() - e.sum() * d.sum() / n.sum()
        spread = ee.sum() - e.sum() ** 2 / n.sum()
        k = (covariance / spread.clamp(min=1e-30)).clamp(min=SLOPES[slope])
    # sums of r and r^2
    r, rr = d - k * e, dd - 2 * k * ed + k**2 * ee
    b = BIASES[bias](d, r) / n
    rows, columns = b.mean(2, keepdim=True), b.mean(1, keepdim=True) - b.mean((1, 2), keepdim=True)
    b, scale = rows + columns, n.sum() * (1 + k) ** 2
    q = (rr - r**2 / n).sum().clamp(min=0) / scale
    return {
        "slope": k,
        "rows": rows,
        "columns": columns,
        "variance": q if variance else torch.zeros_like(q),
        "mse_before": dd.sum() / n.sum(),
        "mse_after": (rr - 2 * b * r + n * b**2).sum() / scale,
    }

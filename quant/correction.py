"""Correction of the noise that quantization adds to eps (PTQD, He et al. 2023, arXiv:2305.10657, "Correlation
disentanglement" and "Quantization noise correction").

At every time t the error d = eps_q - eps splits into a part that follows eps and a residual r of mean b per channel:
    d = k eps + r,    eps' = (eps_q - b) / (1 + k) = eps + (r - b) / (1 + k).
The sampler goes on with eps'. What is left of the error has the variance sigma_q^2 = var(r) / (1 + k)^2, and a sampler
that adds noise of its own adds that much less (ddim/sampler.py).

Axes: S times, N images, C channels of eps.
"""
import torch
from torch import nn

from ddim.sampler import batch_of
from quant.convert import quant_layers


class Correction(nn.Module):
    """Tables over the network's time, zero (the identity) until they are filled: `slope` k (S,), `bias` b (S, C) and
    `variance` sigma_q^2 (S,), of the corrected eps. `times` (S,) ascend. A module, so that the network that it belongs
    to moves and stores it."""

    def __init__(self, times, num_channels):
        super().__init__()
        self.register_buffer("times", times.float())
        self.register_buffer("slope", torch.zeros(len(times)))
        self.register_buffer("bias", torch.zeros(len(times), num_channels))
        self.register_buffer("variance", torch.zeros(len(times)))

    def rows(self, t):
        """Rows (N,) of the tables for the times t (N,): the nearest entry, at most half as far as its nearer neighbour.
        Raises ValueError for a time farther away than that."""
        gaps = nn.functional.pad(self.times.diff(), (1, 1), value=torch.inf)
        reach = torch.minimum(gaps[1:], gaps[:-1]).nan_to_num(posinf=0.0) / 2      # of a lone entry: itself
        distance, rows = (t[:, None] - self.times).abs().min(1)
        if (distance > reach[rows]).any():
            far = float(t[(distance > reach[rows]).nonzero()[0]])
            raise ValueError(f"the noise correction of this network has no statistics for time {far:g} (it has "
                             f"{len(self.times)} times from {self.times[0]:g} to {self.times[-1]:g}); sample with the "
                             "steps it was quantized for, or quantize again with these")
        return rows

    def eps(self, answer, t):
        """The corrected answer of a network, guidance included, at the times t (N,); its channels after the first C (a
        learned variance) stay as they are."""
        rows, num_channels = self.rows(t), self.bias.shape[1]
        slope, bias = (table[rows].reshape(len(rows), -1, 1, 1) for table in (self.slope, self.bias))
        e = (answer[:, :num_channels] - bias) / (1 + slope)
        return torch.cat([e, answer[:, num_channels:]], dim=1)

    def noise_variance(self, t):
        """sigma_q^2 at time t, a number."""
        return float(self.variance[self.rows(torch.tensor([float(t)], device=self.times.device))])


# What is taken for the bias, from the sums over a channel of d and of r: (d, r) -> (C,)
BIASES = {"residual": lambda d, r: r,      # the paper
          "total": lambda d, r: d,         # the released code
          False: lambda d, r: 0 * d}


@torch.no_grad()
def correct_noise(job, *, num_images=1024, seed=2000, slope=True, bias="residual", variance=True):
    """The pass: measure k, b and sigma_q^2 at every time that the sampler visits, both networks on the full-precision
    trajectories of `num_images` images of `seed`, and give them to the quantized network as `correction`. `slope`,
    `bias` (residual, total or false) and `variance` say which parts are corrected; the others stay zero.

    The weights are hardened first. Returns one fact per time: k, mean |b|, sigma_q, and the mean square of eps_q - eps
    and of eps' - eps. Raises ValueError for another word or no images.
    """
    if bias not in BIASES:
        raise ValueError(f"bias '{bias}' of correct_noise is unknown; choose residual, total or false")
    if num_images < 1:
        raise ValueError(f"correct_noise cannot measure on {num_images} images; set num_images to 1 or more")
    for layer in quant_layers(job.net).values():
        layer.harden()
    job.net.correction = None              # that of an earlier pass would be measured along
    totals, images, num_channels = {}, 0, job.model.shape[0]
    for step, t, x, cond, eps in job.trajectory(num_images, seed):
        eps_q = job.model.with_net(job.net).eps(x, batch_of(t, x), cond)
        e, d = eps[:, :num_channels], (eps_q - eps)[:, :num_channels]
        totals[t] = totals.get(t, 0) + sums(e, d)
        if step == 0:
            images += len(x)
            job.log(f"correct_noise: image {images} of {num_images}")
    times = sorted(totals)
    fits = [fit(totals[t], slope, bias, variance) for t in times]
    correction = Correction(torch.tensor(times), num_channels).to(x.device)
    for name in ("slope", "bias", "variance"):
        getattr(correction, name).copy_(torch.stack([tables[name] for tables in fits]))
    job.net.correction = correction
    return [{"pass": "correct_noise", "t": t, "slope": float(tables["slope"]),
             "bias": float(tables["bias"].abs().mean()), "sigma": float(tables["variance"]) ** 0.5,
             "mse_before": float(tables["mse_before"]), "mse_after": float(tables["mse_after"])}
            for t, tables in zip(times, fits)]


def sums(e, d):
    """Per channel n, sum e, sum d, sum e d, sum e^2, sum d^2 of eps e and its error d (N, C, H, W) -> (6, C) float64.
    Those of several batches add up."""
    e, d = e.double(), d.double()
    return torch.stack([a.sum((0, 2, 3)) for a in (torch.ones_like(e), e, d, e * d, e * e, d * d)])


def fit(total, slope, bias, variance):
    """Correction at one time from its `sums`, in closed form: k, not below 0, from the regression of d on eps over all
    elements; sigma_q^2 from the variance of r within the channels."""
    n, e, d, ed, ee, dd = total
    k = torch.zeros_like(n[0])
    if slope:
        covariance, spread = ed.sum() - e.sum() * d.sum() / n.sum(), ee.sum() - e.sum() ** 2 / n.sum()
        k = (covariance / spread.clamp(min=1e-30)).clamp(min=0)
    r, rr = d - k * e, dd - 2 * k * ed + k ** 2 * ee                               # sums of r and r^2
    b = BIASES[bias](d, r) / n
    scale = n.sum() * (1 + k) ** 2
    q = (rr - r ** 2 / n).sum().clamp(min=0) / scale
    return {"slope": k, "bias": b, "variance": q if variance else torch.zeros_like(q),
            "mse_before": dd.sum() / n.sum(), "mse_after": (rr - 2 * b * r + n * b ** 2).sum() / scale}

"""Errors weighed by what they do to the image: reconstruction that knows which spatial frequencies
survive (TinyDM).

What a sampler does with an error of a feature map depends on how the error varies over the map. Of
an error of eps at a noisy step the mean over the map stays in the image as a shift of its colours,
while later steps repair most of the fine part: on latent-compact-class the mean counts 15 times as
much as the average frequency there, on latent-compact 46 times. Inside the network it can be the
other way round, as a norm takes means out.

To first order an error e of a map h at step t moves the clean image x_0 by J e, J = d x_0 / d h. In
the basis of the two-dimensional cosine transform (DCT-II), over which J is taken for diagonal, its
mean square is

    F(t, u, v) e_hat(u, v)^2,
    F(t, u, v) = mean over images and channels of (J^T n)_hat(u, v)^2,  n ~ Normal(0, 1)

and the error to minimise becomes the filtered one, W^(1/2) e_hat with W = F^p / mean over (u, v) of
F^p: every step keeps its weight. With p = 1 it is the diagonal of the Fisher matrix, as BRECQ (Li
et al. 2021, arXiv:2102.05426) weighs elements, in another basis and for the loss that counts here;
p = 0 is the plain error.

Axes: N samples, C channels, H x W positions, G groups of steps."""

import functools
import math
from collections.abc import Iterable
from typing import Any

import torch

from base.hooks import watching

NUM_GROUPS = 10  # of successive steps that share a table
NUM_IMAGES = 8


class FrequencyFilter:
    """filter(name, t, error) -> error of the unit `name` at the steps t (N,), filtered: maps (N, C,
    H, W), tokens (N, L, C) of a square map; others as they are. `power` is p above, in [0, 1].
    Raises ValueError beyond that, and where gradients are not finite."""

    def __init__(self, job: Any, names: Iterable[str], power: float):
        if not 0 <= power <= 1:
            raise ValueError(f"frequency is {power}; it must lie in 0 to 1")
        energies = gradient_energies(job, names)
        self.times = torch.tensor(sorted({t for found in energies.values() for t in found}))
        count = len(self.times)
        self.group = torch.arange(count) * min(NUM_GROUPS, count) // max(count, 1)
        self.gains = {name: self.gain(found, power) for name, found in energies.items() if found}

    def gain(self, energy: dict[float, torch.Tensor], power: float) -> torch.Tensor:
        """Energies by step {t: (H, W)} -> W^(1/2) (G, H, W)."""
        by_step = torch.stack([energy[float(t)] for t in self.times])
        total = torch.zeros(int(self.group[-1]) + 1, *by_step.shape[1:])
        total = total.index_add(0, self.group, by_step)
        if not torch.isfinite(total).all():
            raise ValueError(
                "the gradient of the image by the network's maps is NaN or infinite on this "
                "sampler; set frequency: 0 in reconstruct"
            )
        weight = total.clamp(min=1e-30) ** power
        return (weight / weight.mean((1, 2), keepdim=True)).sqrt()

    def __call__(self, name: str, t: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        if name not in self.gains:
            return error
        nearest = (t.cpu()[:, None] - self.times).abs().argmin(1)
        gain = self.gains[name][self.group[nearest]].to(error.device)
        maps = idct(gain[:, None] * dct(as_maps(error)))
        return maps if error.dim() == 4 else maps.flatten(2).transpose(1, 2)


def gradient_energies(job: Any, names: Iterable[str]) -> dict[str, dict[float, torch.Tensor]]:
    """Measures the energy of the gradient of <n, x_0> by the outputs of units, summed over
    NUM_IMAGES images and meaned over channels: name -> {t: (H, W)}, none for outputs without
    positions. One backward pass through the sampler of a Job (quant/passes/job.py)."""
    net, found, now = job.model.net, {name: {} for name in names}, {}

    def note_time(_, arguments):
        now["t"] = float(arguments[1][0])

    def add(name, t, gradient):
        energy = dct(as_maps(gradient)).square().mean(1).sum(0).cpu()
        found[name][t] = found[name].get(t, 0) + energy

    def watch(name, _, inputs, out):
        if out.requires_grad and as_maps(out) is not None:
            out.register_hook(functools.partial(add, name, now["t"]))

    generator = torch.Generator().manual_seed(job.seed)
    units = {name: functools.partial(watch, name) for name in found}
    with watching(net, {"": note_time}, before=True), watching(net, units), torch.enable_grad():
        for x0 in job.differentiable(NUM_IMAGES, job.seed):
            (x0 * torch.randn(x0.shape, generator=generator).to(x0.device)).sum().backward()
    return found


def as_maps(x: torch.Tensor) -> torch.Tensor | None:
    """Maps (N, C, H, W), also of tokens (N, L, C) of a square map; None of anything else."""
    if x.dim() != 3:
        return x if x.dim() == 4 else None
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).unflatten(2, (side, side)) if side * side == x.shape[1] else None


def dct(x: torch.Tensor) -> torch.Tensor:
    """Orthonormal two-dimensional cosine transform (DCT-II) over the last two axes."""
    return basis(x.shape[-2], x.device) @ x @ basis(x.shape[-1], x.device).T


def idct(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `dct`."""
    return basis(x.shape[-2], x.device).T @ x @ basis(x.shape[-1], x.device)


@functools.lru_cache
def basis(n: int, device: torch.device) -> torch.Tensor:
    """(n, n): row k holds sqrt(2 / n) cos(pi (i + 1/2) k / n), row 0 sqrt(1 / n)."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    rows = (2 / n) ** 0.5 * torch.cos(math.pi * (i + 0.5) * k / n)
    rows[0] = n**-0.5
    return rows.float().to(device)

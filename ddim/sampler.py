"""Samplers: functions of one signature, for every model.

    sampler(eps, x, steps, schedule, *, noise, eta, callback) -> x_0

`eps(x, t)` is the network (guidance inside) with x (N, C, H, W) and t (N,); `steps` ascend as made by
`step_sequence`; `noise()` draws one tensor shaped as x and is called once per step, so that the stream of an image
does not depend on eta; `callback(step, t, x, eps, x0, noise)` observes every step and must not change anything.
"""
import torch


def chain(steps):
    """Ascending steps -> (index, t, next t) from noise to image; the step after the last is -1."""
    return list(zip(range(len(steps)), reversed(steps), list(reversed(steps))[1:] + [-1]))


def batch_of(t, x):
    return torch.full((x.shape[0],), float(t), device=x.device)


def nothing(*_):
    """The callback of a run that nobody observes."""


def ddim(eps, x, steps, schedule, *, noise, eta=0.0, callback=nothing):
    """DDIM (Song et al. 2021, Eq. 12 and 16); eta = 0 is deterministic, eta = 1 has the variance of DDPM."""
    for step, t, t_next in chain(steps):
        a, a_next = schedule.level(t), schedule.level(t_next)
        e, z = eps(x, batch_of(t, x)), noise()
        x0 = (x - (1 - a) ** 0.5 * e) / a ** 0.5                                   # predicted clean image
        sigma = eta * max((1 - a / a_next) * (1 - a_next) / (1 - a), 0.0) ** 0.5
        callback(step, t, x, e, x0, z)
        x = a_next ** 0.5 * x0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * e + sigma * z
    return x


def ddpm(eps, x, steps, schedule, *, noise, eta=1.0, callback=nothing):
    """Ancestral sampling of the chain that visits `steps` (Ho et al. 2020, Algorithm 2, fixed large variance), with
    x0 clamped to [-1, 1] and no noise at t = 0. `eta` scales the noise."""
    for step, t, t_next in chain(steps):
        a, a_next = schedule.level(t), schedule.level(t_next)
        beta = 1 - a / a_next
        e, z = eps(x, batch_of(t, x)), noise()
        x0 = ((x - (1 - a) ** 0.5 * e) / a ** 0.5).clamp(-1, 1)
        callback(step, t, x, e, x0, z)
        x = (a_next ** 0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - a_next) * x) / (1 - a)
        if t > 0:
            x = x + eta * max(beta, 0.0) ** 0.5 * z
    return x


SAMPLERS = {"ddim": ddim, "ddpm": ddpm}


class SeededNoise:
    """One random stream per image: image i draws from (seed, i) whatever the batch, the order or the machine.

    `draw()` gives (N, *shape) float32, always generated on the CPU, then moved to `device`.
    """

    def __init__(self, seed, indices, shape, device="cpu"):
        # SplitMix64 of the pair: neighbouring images get unrelated streams.
        self.generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        self.shape, self.device = tuple(shape), device

    def draw(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def mix(seed, index):
    """A 63-bit seed for the pair."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) % 2 ** 64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2 ** 64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2 ** 64
    return (z ^ z >> 31) % 2 ** 63

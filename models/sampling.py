"""Images drawn from a model.

Axes: N images, C channels, H x W pixels.
"""

import torch
from torch.utils.checkpoint import checkpoint

from base.errors import unknown_word
from ddim.sampler import SAMPLERS, STOCHASTIC, nothing
from ddim.schedule import step_sequence


@torch.no_grad()
def sample(
    model,
    eps,
    indices,
    *,
    sampler="ddim",
    steps=100,
    skip="uniform",
    eta=0.0,
    seed=0,
    batch_size=None,
    start=None,
    callback=nothing,
):
    """Images number `indices` of `seed` -> (len(indices), 3, H, W) uint8.

    `eps(x, t, cond)` is `model.eps` or what stands for it; a correction of the model goes to
    samplers that take one. With `batch_size` B the whole block of images kB ... kB+B-1 that holds
    `indices` runs and the rest is dropped: the row in a batch can change the last bit of a float
    result, so image i always runs in row i % B beside the same neighbours, and has the same bytes
    in any run. Without it the batch is `indices` as they come. `callback` is the sampler's and sees
    the whole batch. `start` is None for the noise of the images, or (x of the whole batch, number
    of last steps to do from there)."""
    if sampler not in SAMPLERS:
        raise ValueError(unknown_word(f"sampler '{sampler}' is unknown", sampler, SAMPLERS))
    batch = rows = list(indices)
    if batch_size:
        first = batch[0] // batch_size * batch_size
        batch, rows = range(first, first + batch_size), [i - first for i in rows]
        assert min(rows) >= 0 and max(rows) < batch_size, (
            "indices must lie in one block of batch_size"
        )
    x = denoise(
        model,
        eps,
        batch,
        sampler=sampler,
        steps=steps,
        skip=skip,
        eta=eta,
        seed=seed,
        start=start,
        callback=callback,
    )
    if not torch.isfinite(x).all():
        raise ValueError(
            f"sampling of {model.name} ended in NaN or infinite values; "
            "with quantized weights use more bits or more calibration data"
        )
    images = model.decode(x)
    return images[rows] if batch_size else images


def denoise(
    model,
    eps,
    batch,
    *,
    sampler,
    steps,
    skip,
    eta,
    seed,
    start=None,
    callback=nothing,
    differentiable=False,
):
    """x_0 (N, C, H, W) of the images `batch`, not decoded; as `sample`. `differentiable` asks for
    the gradient of x_0 by whatever the network computed on the way, whose activations are then
    computed twice and held for one step."""
    noise, cond = model.noise(seed, batch), model.labels(seed, batch)
    options = {"correction": model.correction} if sampler in STOCHASTIC else {}
    x, sequence = noise.draw(), step_sequence(skip, steps, model.schedule)
    # the first noise is drawn all the same: those of the steps stay the same
    if start is not None:
        x, sequence = start[0], sequence[: start[1]]

    def network(x, t):
        return (
            checkpoint(eps, x, t, cond, use_reentrant=False) if differentiable else eps(x, t, cond)
        )

    return SAMPLERS[sampler](
        network,
        x.requires_grad_(differentiable),
        sequence,
        model.schedule,
        noise=noise.draw,
        eta=eta,
        callback=callback,
        **options,
    )

"""The arithmetic of a quantized model: simulated, or real integers.

simulated   integers held in float32, as defined
integer     int8 arithmetic, the same bits
auto        integer where a trial on the model's own shapes is exact and faster"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from base.devices import reuse_memory
from base.errors import unknown_word
from base.network import batch_of
from models.diffusion import DiffusionModel
from quant.integer.lower import IntegerNet
from quant.integer.select import integer_net, trial
from quant.network import in_channels_last, quant_layers

Net = Callable[..., torch.Tensor]
PRECISIONS = ("auto", "integer", "simulated")
TRIED = 8  # samples of a trial at most
CLOSE = 0.1  # of an answer's own size: as far apart as flipped codes may bring two answers


def check_precision(word: str) -> None:
    """Raises ValueError for a word that says neither how a quantized model computes nor `float`."""
    known = [*PRECISIONS, "float"]
    if word not in known:
        raise ValueError(unknown_word(f"precision '{word}' is unknown", word, known))


def with_precision(
    model: DiffusionModel, precision: str, batch_size: int
) -> tuple[DiffusionModel, str]:
    """Returns a quantized model as it computes by `precision`, and one line about that.
    `batch_size` is that of sampling. Raises ValueError for an unknown word, and for `integer` where
    that is not possible."""
    check_precision(precision)
    if isinstance(model.net, IntegerNet):
        return model, "integers, as it was given"
    reuse_memory()
    simulated = in_channels_last(model.net)
    as_simulated = model.with_net(simulated)
    if precision == "simulated":
        return as_simulated, "simulated integers"
    arguments = _arguments(model, min(batch_size, TRIED))
    try:
        lowered = integer_net(simulated, arguments)
    except ValueError as reason:
        if precision == "integer":
            remedy = "use precision=simulated or auto"
            raise ValueError(
                f"precision=integer is not possible here: {reason}; {remedy}"
            ) from None
        return as_simulated, f"simulated integers ({reason})"
    equal, factor = trial(simulated, lowered, arguments)
    bits = "the same bits" if equal else "not the same bits: sums beyond 2^24 are rounded otherwise"
    if model.device.type == "cuda" and not equal:
        # compiled glue may choose the neighbour of a code, float convolutions round their sums;
        # the engine's own sums have been tested
        apart = _apart(simulated, lowered, arguments)
        equal, bits = apart < CLOSE, f"answers {apart:.1%} apart"
    count = len(lowered.integer_layers)
    total = count + len(quant_layers(lowered))
    about = f"{count} of {total} quantized layers on int8, {factor:.2f} x as fast as simulated"
    if precision == "integer" or equal and factor > 1:
        return model.with_net(lowered), f"integers ({about}, {bits})"
    reason = about if equal else "a trial gave other bits"
    return as_simulated, f"simulated integers ({reason})"


@torch.no_grad()
def _apart(a: Net, b: Net, arguments: Sequence[torch.Tensor]) -> float:
    """How far apart two networks answer, in units of the first one's answer."""
    answers = a(*arguments), b(*arguments)
    return float((answers[0] - answers[1]).norm() / answers[0].norm())


def _arguments(model: DiffusionModel, count: int) -> tuple[torch.Tensor, ...]:
    """What the network is called with for the first images of seed 0, at the noisiest step."""
    x = model.noise(0, range(count)).draw()
    step = model.sampling.sequence(model.schedule)[-1]
    t = batch_of(step * model.schedule.time_scale, x)
    return model.network_inputs(x, t, model.labels(0, range(count)))

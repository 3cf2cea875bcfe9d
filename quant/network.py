"""A quantized network: the converted one, the timeline that tells its quantizers the time, and what
surrounds it: the bypass of its input, the correction of its noise.

Modules are called by the names that they have in the float network, in rules, facts, files and in
all functions of this file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from base.hooks import watching
from quant.layers import QuantLayer
from quant.observer import VALUES_PER_GROUP, Observer
from quant.quantizer import Quantizer
from quant.timeline import Timeline


class QuantizedNet(nn.Module):
    """A converted network `net` whose quantizers read the time from `timeline`.

    `bypass` (or None) adds what the rounding of x does to the answer; `correction` (or None) is
    applied to the answer by the model that calls the network, behind guidance; `recipe` is the
    JSON-able dict that is stored with it; `observers` {quantizer: Observer} hold what `observing`
    has seen until `fit` uses it."""

    def __init__(self, net: nn.Module, timeline: Timeline):
        super().__init__()
        self.net, self.timeline = net, timeline
        self.bypass: Bypass | None = None
        self.correction: Correction | None = None
        self.recipe: dict[str, Any] = {}
        self.observers: dict[Quantizer, Observer] = {}

    def forward(self, x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        """The answer to x (N, C, H, W) at the network times t (N,), under a condition if any."""
        self.timeline.set_time(t)
        return self.answer(x, t, *cond)

    def answer(self, x: torch.Tensor, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        """The same at the time that the timeline has been told."""
        answer = self.net(x, t, *cond)
        return answer if self.bypass is None else answer + self.bypass(self.input_error(x))

    def input_error(self, x: torch.Tensor) -> torch.Tensor:
        """x minus what the first layer makes of it, at the time that the timeline has been told."""
        return stem_of(self).input_error(x)

    def get_submodule(self, target: str) -> nn.Module:
        """The module of the converted network that has this name in the float network."""
        return self.net.get_submodule(target)

    def set_submodule(self, target: str, module: nn.Module, strict: bool = False) -> None:
        """Replace the module that has this name in the float network."""
        self.net.set_submodule(target, module, strict)


class Bypass(nn.Module):
    """The table `gain` K (S, outputs, C) of a network whose first layer rounds x: for each time
    segment what a rounding error of x adds to the answer, zero until it is fitted."""

    def __init__(self, timeline: Timeline, outputs: int, channels: int):
        super().__init__()
        self.timeline = timeline
        self.register_buffer("gain", torch.zeros(timeline.num_segments, outputs, channels))

    def forward(self, error: torch.Tensor) -> torch.Tensor:
        """What x minus its rounded self (N, C, H, W) adds to the answer (N, outputs, H, W)."""
        added = self.gain[self.timeline.segment] @ error.flatten(2)
        return added.unflatten(2, error.shape[2:])


class Correction(nn.Module):
    """Tables over the network's time, zero (the identity) until they are filled: `slope` k (S,),
    `rows` (S, C, H, 1) and `columns` (S, C, 1, W), whose sum is b (per channel H = W = 1), and
    `variance` sigma_q^2 (S,), of the corrected eps. `times` (S,) ascend. A module, so that the
    network that it belongs to moves and stores it."""

    def __init__(self, times: torch.Tensor, num_channels: int, height: int = 1, width: int = 1):
        super().__init__()
        self.register_buffer("times", times.float())
        self.register_buffer("slope", torch.zeros(len(times)))
        self.register_buffer("rows", torch.zeros(len(times), num_channels, height, 1))
        self.register_buffer("columns", torch.zeros(len(times), num_channels, 1, width))
        self.register_buffer("variance", torch.zeros(len(times)))

    def entries(self, t: torch.Tensor) -> torch.Tensor:
        """Entries (N,) of the tables for the times t (N,): the nearest, at most half as far as its
        nearer neighbour. Raises ValueError for a time farther away than that."""
        gaps = nn.functional.pad(self.times.diff(), (1, 1), value=torch.inf)
        # of a lone entry: itself
        reach = torch.minimum(gaps[1:], gaps[:-1]).nan_to_num(posinf=0.0) / 2
        distance, entries = (t[:, None] - self.times).abs().min(1)
        if (distance > reach[entries]).any():
            far = float(t[(distance > reach[entries]).nonzero()[0]])
            raise ValueError(
                f"the noise correction of this network has no statistics for time {far:g} (it has "
                f"{len(self.times)} times from {self.times[0]:g} to {self.times[-1]:g}); sample "
                "with the steps it was quantized for, or quantize again with these"
            )
        return entries

    def eps(self, answer: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The corrected answer of a network, guidance included, at the times t (N,); its channels
        after the first C (a learned variance) stay as they are."""
        i, num_channels = self.entries(t), self.rows.shape[1]
        slope = self.slope[i].reshape(-1, 1, 1, 1)
        e = (answer[:, :num_channels] - (self.rows[i] + self.columns[i])) / (1 + slope)
        return torch.cat([e, answer[:, num_channels:]], dim=1)

    def noise_variance(self, t: float) -> float:
        """sigma_q^2 at time t."""
        entry = self.entries(torch.tensor([float(t)], device=self.times.device))
        return float(self.variance[entry])


def core_of(net: nn.Module) -> nn.Module:
    """The network that has the float network's names: `net`, or what a QuantizedNet holds."""
    return net.net if isinstance(net, QuantizedNet) else net


def modules_of(net: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of a network, float or quantized, in registration order."""
    return dict(core_of(net).named_modules())


def quant_layers(net: nn.Module) -> dict[str, QuantLayer]:
    """Name -> quantized layer, in registration order."""
    return {name: m for name, m in modules_of(net).items() if isinstance(m, QuantLayer)}


def input_quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Name -> activation quantizer, in registration order."""
    quantizers = {name: m for name, m in modules_of(net).items() if isinstance(m, Quantizer)}
    return {name: q for name, q in quantizers.items() if not name.endswith("weight_quantizer")}


def stem_of(net: nn.Module) -> nn.Module | None:
    """The layer that reads x on a grid, on integers or not; None where x is read as it is."""
    stems = (m for m in modules_of(net).values() if getattr(m, "role", None) == "stem")
    return next((m for m in stems if getattr(m, "input_quantizer", None) is not None), None)


def in_channels_last(net: nn.Module, instead: Mapping[int, Any] | None = None) -> nn.Module:
    """A copy of a network on the same timeline with weights laid out so that its maps are
    channels_last, as integer engines hold them: a norm adds up the values of a map in the order of
    memory. It shares all other tensors. `instead` {id of a module: what stands in its place}."""
    known = dict(instead or {})
    for module in net.modules():
        known |= {id(m): m for m in vars(module).values() if isinstance(m, Timeline)}
    for tensor in (*net.parameters(), *net.buffers()):
        laid_out = tensor.detach()
        if tensor.dim() in (4, 5):  # of convolutions, also one for every time segment
            laid_out = laid_out.movedim(-3, -1).contiguous().movedim(-1, -3)
        is_parameter = isinstance(tensor, nn.Parameter)
        known[id(tensor)] = nn.Parameter(laid_out, False) if is_parameter else laid_out
    return copy.deepcopy(net, known)


@contextmanager
def in_full_precision(net: nn.Module) -> Iterator[None]:
    """Without any of its quantizers, fitted or not, for a while; what balances channels stays."""
    quantizers = [module for module in net.modules() if isinstance(module, Quantizer)]
    for q in quantizers:
        q.enabled = False
    try:
        yield
    finally:
        for q in quantizers:
            q.enabled = True


@contextmanager
def observing(
    net: QuantizedNet, num_samples: int = 256, num_values: int = VALUES_PER_GROUP
) -> Iterator[None]:
    """While the block runs, the network answers in full precision and what reaches its activation
    quantizers is noted, for `fit`. Several calls and several blocks add up; about `num_samples`
    samples in all are expected; of each an even share of `num_values` values is kept for a scale.
    An error in the block forgets everything.

    >>> qnet = quant.convert(net, rules)
    >>> with quant.observing(qnet):
    ...     answer = qnet(x, t)
    >>> torch.allclose(answer, net(x, t), atol=1e-6)
    True
    """
    readers = [name for name, m in modules_of(net).items() if hasattr(m, "quantizer_inputs")]

    def note(module, inputs):
        for q, x in module.quantizer_inputs(*inputs):
            net.observers[q].note(x)

    for q in input_quantizers(net).values():
        net.observers.setdefault(q, Observer(q, num_samples, num_values))
    try:
        callbacks = dict.fromkeys(readers, note)
        with in_full_precision(net), watching(core_of(net), callbacks, before=True):
            yield
    except BaseException:
        net.observers.clear()
        raise


def fit(net: QuantizedNet, *, neighbours: int = 0, batch_size: int = 64) -> None:
    """Choose every scale and zero point: weights from the weights, activations from what was
    observed, in each time segment also from the `neighbours` before and after it; `batch_size`
    samples at a time, which a moving average (`ema`) goes by. Raises ValueError if nothing was
    observed, if a segment was not, or for weights that are integers already.

    >>> qnet = quant.convert(net, rules)
    >>> with quant.observing(qnet):
    ...     answer = qnet(x, t)
    >>> quant.fit(qnet)
    >>> bool((qnet(x, t) - answer).abs().max() < 0.1)
    True
    """
    layers = [m for m in quant_layers(net).values() if m.weight_quantizer is not None]
    quantizers, observers = input_quantizers(net).values(), dict(net.observers)
    net.observers.clear()
    if any(layer.weight_int is not None for layer in layers):
        raise ValueError("weights are integers already; fit a network that was just converted")
    if quantizers and not any(observer.noted for observer in observers.values()):
        raise ValueError(
            "nothing was observed; run the network on samples inside `with observing(net):` first"
        )
    for layer in layers:
        layer.fit_weight()
    for q in quantizers:
        observers[q].fit(neighbours, batch_size)


def harden(net: nn.Module) -> None:
    """Make integers of all weights, and tables of all scales that are still learned."""
    for module in [*quant_layers(net).values(), *input_quantizers(net).values()]:
        module.harden()


def set_input_quantization(net: nn.Module, enabled: bool) -> None:
    """Switch the activation quantizers of a network on or off."""
    for quantizer in input_quantizers(net).values():
        quantizer.enabled = enabled

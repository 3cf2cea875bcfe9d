"""Whether a quantized network can run on integers here, by trial, and the network that does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from quant.integer import glue, glue_cpu
from quant.integer.cpu import cpu_engine
from quant.integer.cuda import cuda_engine
from quant.integer.glue_cuda import InductorGlue
from quant.integer.lower import IntegerNet, lower
from quant.layers import QuantLayer
from quant.network import QuantizedNet, quant_layers

Arguments = Sequence[torch.Tensor]  # x (N, C, H, W), t (N,) and the condition if there is one
REPEATS = 3  # forward passes of each kind in a trial


def integer_net(net: QuantizedNet, arguments: Arguments, *, compiled: bool = True) -> IntegerNet:
    """The network on the integer engine of its device, bit for bit what `in_channels_last` of it
    gives. `arguments` are those of any number of samples; only their shapes matter. What lies
    between the products runs in compiled form where there is a compiler, or with `compiled=False`
    in plain PyTorch. Raises ValueError where weights are not integers yet, and in one sentence
    where no layer can run on integers."""
    layers = quant_layers(net)
    floats = [name for name, m in layers.items() if _is_soft(m)]
    if floats or not layers:
        raise ValueError(
            f"{len(floats)} layers have no integer weights yet ({', '.join(floats[:3])}); harden "
            "the network first, as quant.save does"
            if floats
            else "the network has no quantized layer; convert it first"
        )
    engine, kit = _engine(arguments[0].device, compiled)
    if isinstance(engine, str):
        raise ValueError(f"no integer engine here: {engine}")
    lowered = lower(net, [a[:1] for a in arguments], engine, kit)
    if not lowered.integer_layers:
        name, why = next(iter(lowered.reasons.items()))
        raise ValueError(f"no layer of this network can run on integers; {name}: {why}")
    return lowered


def _is_soft(layer: QuantLayer) -> bool:
    return layer.weight_quantizer is not None and layer.weight_int is None


def _engine(device: torch.device, compiled: bool) -> tuple[Any, Any]:
    """What makes integer products on a device, or why nothing does, and its glue. Engines have
    been tested against the definition when they are handed out."""
    if device.type == "cpu":
        return cpu_engine(), glue_cpu.load() if compiled else glue
    if device.type == "cuda":
        return cuda_engine(device), InductorGlue() if compiled else glue
    return f"there is none for {device.type}", glue


@torch.no_grad()
def trial(
    simulated: Callable[..., torch.Tensor],
    integer: Callable[..., torch.Tensor],
    arguments: Arguments,
) -> tuple[bool, float]:
    """Runs both on the same samples, in turn; returns whether they answered the same bits and how
    many times faster the second was."""
    equal = torch.equal(simulated(*arguments), integer(*arguments))
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for run, spent in zip((simulated, integer), seconds):
            started = time.perf_counter()
            run(*arguments).sum().item()  # waits for the device
            spent.append(time.perf_counter() - started)
    return equal, min(seconds[0]) / min(seconds[1])

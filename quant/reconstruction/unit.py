"""A reconstruction unit while it is learned: its inputs, its error, its file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.files import load_tensors, save_tensors
from base.workers import Share, first_only, part_of, summed
from quant.layers import QuantLayer
from quant.network import input_quantizers, quant_layers

DROPPED_INPUTS = 0.5  # share of a unit's input that is full precision in joint mode (QDrop)
ERROR_ROWS = 128  # samples on which the error before and after is measured
Inputs = list[Any]  # arguments over all samples, each read by rows as a tensor (N, ...)


@dataclass
class Unit:
    """A unit of the quantized network as it is being learned."""

    name: str
    module: nn.Module
    device: torch.device
    set_time: Callable[[torch.Tensor], Any]  # tells the timeline which rows are about to run
    batch_size: int = 64  # samples measured at once
    # the unit of the full-precision network, and its inputs
    original: nn.Module | None = None
    float_inputs: Inputs | None = None
    # time segment of every row, and how often each segment was drawn
    segments: torch.Tensor | None = None
    visits: torch.Tensor | None = None
    # rows, output -> weights that broadcast to the output, mean 1; None: alike
    saliency: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None] | None = None
    # rows, error -> error filtered by what it does to the image; None: as it is
    frequency: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    # of the batch that is being learned from, the samples that this worker computes
    share: Share | None = None

    def __call__(self, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        """Runs the unit on the `rows` of its inputs."""
        return self.call(self.module, inputs, rows)

    def call(self, module: nn.Module, inputs: Inputs, rows: torch.Tensor) -> torch.Tensor:
        """Runs `module` in its place."""
        self.set_time(rows)
        return module(*(_channels_last(a[rows].to(self.device)) for a in inputs))


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


class Mixed:
    """Elements of `a` or, each with probability one half, of `b`; read by rows, those of `unit`'s
    share of a batch if one is given."""

    def __init__(self, a: Any, b: Any, generator: torch.Generator, unit: Unit | None = None):
        self.a, self.b, self.generator, self.unit = a, b, generator, unit

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        a, b = self.a[rows], self.b[rows]
        draws = uniform_like(a, self.generator, self.unit and self.unit.share)
        return torch.lerp(a, b, draws.lt_(DROPPED_INPUTS))


def mixed(
    quant_inputs: Inputs, float_inputs: Inputs, generator: torch.Generator, unit: Unit | None = None
) -> Inputs:
    """Returns a unit's inputs for joint learning: its main input mixed elementwise, embedding and
    condition as they are in the quantized network."""
    return [Mixed(quant_inputs[0], float_inputs[0], generator, unit), *quant_inputs[1:]]


def uniform_like(
    x: torch.Tensor, generator: torch.Generator, share: Share | None = None
) -> torch.Tensor:
    """Draws from [0, 1), of the shape of x: on the CPU by `generator`, elsewhere by one that it
    seeds, as millions of numbers for each step would keep a GPU waiting. Where x is a `share` of a
    batch, they are those that the whole batch would get there."""
    shape = share.whole(x.shape) if share else x.shape
    if x.device.type != "cpu":
        seed = int(torch.randint(2**62, (), generator=generator))
        generator = torch.Generator(x.device).manual_seed(seed)
    draws = torch.rand(shape, generator=generator, device=x.device)
    return share.of(draws) if share else draws


@torch.no_grad()
def relative_error(unit: Unit, inputs: Inputs, target: torch.Tensor) -> float:
    """Returns the mean square of (unit(inputs) - target) over that of target (N, ...), on an even
    pick of the samples."""
    rows = torch.linspace(0, len(target) - 1, min(ERROR_ROWS, len(target))).long()
    error = power = 0.0
    for part in part_of(rows.split(unit.batch_size)):
        wanted = target[part].to(unit.device)
        error += float((unit(inputs, part) - wanted).square().sum())
        power += float(wanted.square().sum())
    error, power = summed([torch.tensor([error, power], dtype=torch.float64)])[0].tolist()
    return error / max(power, 1e-30)


@first_only
def save_unit(module: nn.Module, path: Path, facts: list[dict[str, Any]]) -> None:
    """Writes everything that reconstruction decided, integer weights and activation scales, what
    the integers stand on, and its `facts`."""
    tensors = {}
    for name, layer in quant_layers(module).items():
        if layer.weight_int is not None:
            tensors[f"{name}|weight_int"] = layer.weight_int.to(torch.int16)
            tensors |= {f"{name}|{key}": value for key, value in _stands_on(layer).items()}
    for name, q in input_quantizers(module).items():
        tensors[f"{name}|scale"] = q.scale
        tensors |= {f"{name}|soft.{key}": value for key, value in q.learned_by().items()}
    save_tensors(path, tensors or {"empty": torch.zeros(1)}, {"facts": facts})


def _stands_on(layer: QuantLayer) -> dict[str, torch.Tensor]:
    """What integer weights mean nothing without: grid and balance, which earlier passes chose."""
    q = layer.weight_quantizer
    found = {"scale": q.scale, "zero_point": q.zero_point, "bits": torch.tensor(q.spec.bits)}
    if layer.inverse_balance is not None:
        found["inverse_balance"] = layer.inverse_balance
    return {f"on.{key}": value for key, value in found.items()}


def load_unit(module: nn.Module, path: Path) -> list[dict[str, Any]] | None:
    """Puts a saved unit back; returns its facts, None where there is none, or it was learned upon
    other grids or another balance: on another device or number of threads, sums round otherwise and
    earlier passes may choose otherwise."""
    if not path.is_file():
        return None
    layers, quantizers, saved = quant_layers(module), input_quantizers(module), {}
    tensors, meta = load_tensors(path)
    for key, value in tensors.items():
        name, _, part = key.rpartition("|")
        saved.setdefault(name, {})[part] = value
    for name, parts in saved.items():
        if "weight_int" in parts:
            before = {key: value for key, value in parts.items() if key.startswith("on.")}
            now = {key: value.cpu() for key, value in _stands_on(layers[name]).items()}
            if before.keys() != now.keys() or not all(torch.equal(before[k], now[k]) for k in now):
                return None
    for name, parts in saved.items():
        if "weight_int" in parts:
            layers[name].harden()
            layers[name].weight_int.copy_(parts["weight_int"])
        if "scale" in parts:
            quantizers[name].scale.data.copy_(parts["scale"])
        soft = [key.removeprefix("soft.") for key in parts if key.startswith("soft.")]
        for key in soft:
            quantizers[name].soft_scale.get_parameter(key).data.copy_(parts[f"soft.{key}"])
        if soft:
            quantizers[name].harden()  # others wait for the pass that learns them
    return meta["facts"]

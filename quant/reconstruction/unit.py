"""A reconstruction unit while it is learned: its inputs, its error, its file."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from base.files import load_tensors, save_tensors
from quant.network import input_quantizers, quant_layers

# share of a unit's input that is full precision in joint mode (QDrop)
DROPPED_INPUTS = 0.5


@dataclass
class Unit:
    """A unit of the quantized network as it is being learned."""

    name: str
    module: torch.nn.Module
    device: torch.device
    # tells the timeline which calibration rows are about to run
    set_time: Callable
    original: Any = None  # the unit of the full-precision network, and its inputs
    float_inputs: Any = None
    segments: Any = None  # time segment of every row, and how often each was drawn
    visits: Any = None
    # rows, output -> weights that broadcast to the output, mean 1; None: alike
    saliency: Any = None
    # rows, error -> error filtered by what it does to the image; None: as it is
    frequency: Any = None

    def __call__(self, inputs, rows):
        return self.call(self.module, inputs, rows)

    def call(self, module, inputs, rows):
        self.set_time(rows)
        x = [a[rows].to(self.device) for a in inputs]
        return module(
            *(a.contiguous(memory_format=torch.channels_last) if a.dim() == 4 else a for a in x)
        )


class Mixed:
    """Elements of `a` or, each with probability one half, of `b`; read by rows."""

    def __init__(self, a, b, generator):
        self.a, self.b, self.generator = a, b, generator

    def __getitem__(self, rows):
        a, b = self.a[rows], self.b[rows]
        return torch.where(torch.rand(a.shape, generator=self.generator) < DROPPED_INPUTS, b, a)


def uniform_like(x, generator):
    """Draws from [0, 1) of the shape of x: on the CPU by `generator`, elsewhere by one that it
    seeds, as millions of numbers for each step would keep a GPU waiting."""
    if x.device.type == "cpu":
        return torch.rand(x.shape, generator=generator)
    own = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))
    return torch.rand(x.shape, generator=own, device=x.device)


def mixed(quant_inputs, float_inputs, generator):
    """A unit's inputs for joint learning: its main input mixed elementwise, embedding and condition
    as they are in the quantized network."""
    return [Mixed(quant_inputs[0], float_inputs[0], generator), *quant_inputs[1:]]


ERROR_ROWS = 256  # samples on which the error before and after is measured


@torch.no_grad()
def relative_error(unit, inputs, target, batch_size=64):
    """mean square of (unit(inputs) - target) over mean square of target, on an even pick of the
    samples."""
    rows = torch.linspace(0, len(target) - 1, min(ERROR_ROWS, len(target))).long()
    error = power = 0.0
    for part in rows.split(batch_size):
        wanted = target[part].to(unit.device)
        error += float((unit(inputs, part) - wanted).square().sum())
        power += float(wanted.square().sum())
    return error / max(power, 1e-30)


def save_unit(module, path, facts):
    """Everything reconstruction decided: integer weights and activation scales; and what the
    integers stand on."""
    layers = {
        name: layer for name, layer in quant_layers(module).items() if layer.weight_int is not None
    }
    tensors = {
        f"{name}|weight_int": layer.weight_int.to(torch.int16) for name, layer in layers.items()
    }
    tensors |= {
        f"{name}|on.{key}": value
        for name, layer in layers.items()
        for key, value in stands_on(layer).items()
    }
    for name, q in input_quantizers(module).items():
        tensors[f"{name}|scale"] = q.scale
        tensors |= {f"{name}|soft.{key}": value for key, value in q.learned_by().items()}
    save_tensors(path, tensors or {"empty": torch.zeros(1)}, {"facts": facts})


def stands_on(layer):
    """What integer weights mean nothing without: grid and balance, which earlier passes chose."""
    q = layer.weight_quantizer
    found = {"scale": q.scale, "zero_point": q.zero_point, "bits": torch.tensor(q.spec.bits)}
    return found | (
        {} if layer.inverse_balance is None else {"inverse_balance": layer.inverse_balance}
    )


def load_unit(module, path):
    """Put a saved unit back; returns its facts, None where it was learned upon other grids or
    another balance: on another device or number of threads, sums round otherwise and earlier passes
    may choose otherwise."""
    layers, quantizers = quant_layers(module), input_quantizers(module)
    tensors, meta = load_tensors(path)
    for name in (key.removesuffix("|weight_int") for key in tensors if key.endswith("|weight_int")):
        before = {
            key.rpartition("|on.")[2]: value
            for key, value in tensors.items()
            if key.startswith(f"{name}|on.")
        }
        now = {key: value.cpu() for key, value in stands_on(layers[name]).items()}
        if before.keys() != now.keys() or any(
            not torch.equal(before[key], now[key]) for key in now
        ):
            return None
    for key, value in tensors.items():
        name, _, part = key.rpartition("|")
        if part == "weight_int":
            layers[name].harden()
            layers[name].weight_int.copy_(value)
        elif part == "scale":
            quantizers[name].scale.data.copy_(value)
        elif part.startswith("soft."):
            quantizers[name].soft_scale.get_parameter(part.removeprefix("soft.")).data.copy_(value)
    for name in {key.rpartition("|soft.")[0] for key in tensors if "|soft." in key}:
        quantizers[name].harden()  # others wait for the pass that learns them
    return meta["facts"]

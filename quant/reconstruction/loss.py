"""Losses of block reconstruction, and what they compare."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from base.hooks import watching
from quant.network import quant_layers
from quant.reconstruction.unit import Unit

BLOCK_ENDS = "conv2", "ff"  # roles


def lp(
    a: torch.Tensor, b: torch.Tensor | float, norm: float, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums |a - b|^norm over axis 1 and means over the rest. `weights` broadcast to a."""
    error = (a - b).abs().pow(norm)
    return (error if weights is None else error * weights).sum(1).mean()


def comparable(module: nn.Module) -> list[str]:
    """Names a block's inner layers whose outputs are those of the full-precision layers: all but
    the one that ends the block, and but queries, keys and values of a balanced attention, whose
    scales moved between them (quant/passes/balance.py). A block ends with its second convolution,
    not with the shortcut, or with its feed-forward part; else with the layer that was registered
    last."""
    layers = quant_layers(module)
    ends = [name for role in BLOCK_ENDS for name, layer in layers.items() if layer.role == role]
    end = (ends or list(layers))[-1]
    del layers[end]
    balanced = [name for name, layer in layers.items() if layer.inverse_balance is not None]
    moved = {name for name in balanced if layers[name].role in ("q", "k", "v", "qkv")}
    return [name for name in layers if name not in moved]


def output_loss(
    unit: Unit, out: torch.Tensor, target: torch.Tensor, rows: torch.Tensor, norm: float
) -> torch.Tensor:
    """Measures the output of a unit for the samples `rows` against the target (N, ...), weighed as
    the unit says."""
    weights = unit.saliency(rows, out) if unit.saliency else None
    error = out.float() - target[rows].to(unit.device)
    return lp(unit.frequency(rows, error) if unit.frequency else error, 0, norm, weights)


@contextmanager
def outputs_of(module: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While inside: a dict that collects what the submodules `names` put out."""
    outputs = {}

    def note(name, _, inputs, out):
        outputs[name] = out

    with watching(module, {name: partial(note, name) for name in names}):
        yield outputs

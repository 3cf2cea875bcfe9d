"""Factors of channels that move from one layer of an attention to another, exactly: out of the
layers that read a norm into the norm, and along the rows of queries, keys and values."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from base.hooks import watching
from base.network import AttentionPart
from quant.layers import QuantLayer
from quant.network import QuantizedNet


@torch.no_grad()
def check_folds(
    net: nn.Module, parts: list[AttentionPart], arguments: Iterable[torch.Tensor]
) -> None:
    """Raises ValueError unless the readers of each part read what its norm answers, and nothing
    else does: s goes through no activation and must meet 1/s wherever it comes."""
    answers, readers = {}, {part.norm: [] for part in parts}

    def keep(norm, module, inputs, out):
        if not getattr(module, "silu", False):  # what goes through an activation is no answer
            answers[norm] = out  # kept, so that its storage is its own

    def compare(name, _, inputs):
        places = {x.untyped_storage().data_ptr() for x in inputs if torch.is_tensor(x)}
        for norm, out in answers.items():
            if out.untyped_storage().data_ptr() in places:
                readers[norm].append(name)

    leaves = [name for name, module in net.named_modules() if not any(module.children())]
    device = next(net.parameters()).device
    with (
        watching(net, {norm: partial(keep, norm) for norm in readers}),
        watching(net, {name: partial(compare, name) for name in leaves}, before=True),
    ):
        net(*(a.to(device) for a in arguments))
    for part in parts:
        if sorted(readers[part.norm]) != sorted(part.readers):
            raise ValueError(
                f"{part.norm} cannot take the balance of {', '.join(part.readers)}: what it "
                f"answers is read by {', '.join(readers[part.norm]) or 'none of the layers'}; set "
                "balance: false for them"
            )


@torch.no_grad()
def fold_into_norm(net: QuantizedNet, part: AttentionPart, layers: list[QuantLayer]) -> None:
    """Takes 1/s from the layers that read a norm to the norm itself: exact, nothing is between."""
    norm, inverse = net.get_submodule(part.norm), layers[0].inverse_balance
    norm.weight = nn.Parameter(norm.weight * inverse, requires_grad=False)
    if norm.bias is not None:
        norm.bias = nn.Parameter(norm.bias * inverse, requires_grad=False)
    for layer in layers:
        layer.inverse_balance = torch.ones_like(inverse)


@torch.no_grad()
def scale_rows(layer: QuantLayer, rows: torch.Tensor, factors: torch.Tensor) -> None:
    """Multiplies the rows (output channels) of a layer, and its bias, by factors (len(rows),)."""
    whole = torch.ones(layer.shape[0], device=layer.weight.device)
    whole[rows] = factors
    layer.scale_weight(whole[:, None])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias * whole, requires_grad=False)

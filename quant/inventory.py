"""What of a network is quantized and runs on int8: a row per layer, and shares of the whole."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from base.network import Matmul
from quant.integer.support import why_as_defined
from quant.network import QuantizedNet, modules_of
from quant.quantizer import Quantizer
from quant.rules import listed, role_of

INT8 = "int8"


def quantization_map(
    net: nn.Module, quantized: QuantizedNet, macs: Mapping[str, int], times: Sequence[float] = (0,)
) -> dict[str, Any]:
    """What is quantized: a row per layer in execution order and the share of parameters and of
    multiply-adds whose weight (for attention products: both operands) is below 32 bits. Widths of
    an activation that differ by time are given as their mean over `times`, the network times of the
    sampler; `bit_product`, the two widths of a multiply-add multiplied, is a mean likewise.
    `arithmetic` is int8, or why a layer is computed in floats by precision=integer too."""
    modules, floats = modules_of(quantized), modules_of(net)
    times = torch.tensor(times, dtype=torch.float32)
    rows = [_row(name, macs[name], modules[name], floats[name], times) for name in macs]
    within = [row for row in rows if row["quantized"]]
    layers = [floats[row["name"]] for row in within if row["kind"] != "matmul"]
    weights = sum(layer.weight.numel() for layer in layers)
    on_int8 = [row for row in rows if row["arithmetic"] == INT8]
    return {
        "layers": rows,
        "params_share": weights / sum(p.numel() for p in net.parameters()),
        "macs_share": sum(row["macs"] for row in within) / sum(macs.values()),
        "int8_share": sum(row["macs"] for row in on_int8) / sum(macs.values()),
    }


def _row(name, macs, module, source, times):
    """What is said of one layer or product `module` that stands for the float `source`."""
    product = isinstance(source, Matmul)
    parts = ("a", "b") if product else ("weight", "input")
    quantizers = [getattr(module, f"{part}_quantizer", None) for part in parts]
    widths = [bits_at(quantizer, times) for quantizer in quantizers]
    first, second = map(mean, widths)
    return {
        "name": name,
        "macs": macs,
        "bit_product": mean(widths[0] * widths[1]),
        "role": "+".join(source.roles) if product else role_of(source),
        "kind": "matmul" if product else type(source).__name__,
        "weight_bits": None if product else first,
        "input_bits": [first, second] if product else second,
        "params": 0 if product else sum(p.numel() for p in source.parameters()),
        "quantized": (max(first, second) if product else first) < 32,
        "arithmetic": why_as_defined(module) or INT8,
    }


def bits_at(quantizer: Quantizer | None, times: torch.Tensor) -> torch.Tensor:
    """Widths (T,) of a quantizer, or 32 for None, at network times (T,)."""
    widths = torch.tensor([32] if quantizer is None else quantizer.bits, dtype=torch.float64)
    if len(widths) > 1:
        return widths[quantizer.timeline.segments_of(times)]
    return widths.expand(len(times))


def mean(values: torch.Tensor) -> int | float:
    """Mean as an int where it is whole."""
    value = values.mean().item()
    return int(value) if value.is_integer() else value


def format_map(facts: Mapping[str, Any]) -> str:
    """The map as text."""
    lines = [
        f"{'layer':32} {'role':11} {'W':>3} {'A':>6} {'params':>10} {'M mult-adds':>12}  arithmetic"
    ]
    for row in facts["layers"]:
        bits = "/".join(f"{b:.3g}" for b in listed(row["input_bits"]))
        lines.append(
            f"{row['name']:32} {row['role']:11} {row['weight_bits'] if row['params'] else '-':>3} "
            f"{bits!s:>6} {row['params']:>10,} {row['macs'] / 1e6:>12.2f}  {row['arithmetic']}"
        )
    lines.append(
        f"quantized: {facts['params_share']:.2%} of the parameters, {facts['macs_share']:.2%} of "
        f"the multiply-adds; on int8: {facts['int8_share']:.2%} of the multiply-adds"
    )
    return "\n".join(lines)

"""What of a network is quantized: a row per layer, and shares of the whole."""

import torch

from base.network import Matmul
from quant.network import modules_of
from quant.rules import listed, role_of


def quantization_map(net, quantized, macs, times=(0,)):
    """What is quantized: a row per layer in execution order and the share of parameters and of
    multiply-adds whose weight (for attention products: both operands) is below 32 bits. Widths of
    an activation that differ by time are given as their mean over `times`, the network times of the
    sampler; `bit_product`, the two widths of a multiply-add multiplied, is a mean likewise."""
    rows, modules, floats = [], modules_of(quantized), modules_of(net)
    times = torch.tensor(times, dtype=torch.float32)
    for name, count in macs.items():
        module, source = modules[name], floats[name]
        product = isinstance(source, Matmul)
        widths = [
            bits_at(getattr(module, f"{part}_quantizer", None), times)
            for part in (("a", "b") if product else ("weight", "input"))
        ]
        first, second = map(mean, widths)
        row = {"name": name, "macs": count, "bit_product": mean(widths[0] * widths[1])}
        if product:
            rows.append(
                row
                | {
                    "role": "+".join(source.roles),
                    "kind": "matmul",
                    "weight_bits": None,
                    "input_bits": [first, second],
                    "params": 0,
                    "quantized": max(first, second) < 32,
                }
            )
        else:
            rows.append(
                row
                | {
                    "role": role_of(source),
                    "kind": type(source).__name__,
                    "weight_bits": first,
                    "input_bits": second,
                    "params": sum(p.numel() for p in source.parameters()),
                    "quantized": first < 32,
                }
            )
    total = sum(p.numel() for p in net.parameters())
    weights = sum(
        dict(floats[r["name"]].named_parameters())["weight"].numel()
        for r in rows
        if r["quantized"] and r["kind"] != "matmul"
    )
    total_macs = sum(macs.values())
    return {
        "layers": rows,
        "params_share": weights / total,
        "macs_share": sum(r["macs"] for r in rows if r["quantized"]) / total_macs,
    }


def bits_at(quantizer, times):
    """Widths (T,) of a quantizer, or 32 for None, at network times (T,)."""
    widths = torch.tensor([32] if quantizer is None else quantizer.bits, dtype=torch.float64)
    return (widths[quantizer.timeline.segments_of(times)] if len(widths) > 1 else widths).expand(
        len(times)
    )


def mean(values):
    """Mean as an int where it is whole."""
    value = values.mean().item()
    return int(value) if value.is_integer() else value


def format_map(facts):
    """The map as text."""
    lines = [f"{'layer':32} {'role':11} {'W':>3} {'A':>6} {'params':>10} {'M mult-adds':>12}"]
    for row in facts["layers"]:
        bits = "/".join(f"{b:.3g}" for b in listed(row["input_bits"]))
        lines.append(
            f"{row['name']:32} {row['role']:11} {row['weight_bits'] if row['params'] else '-':>3} "
            f"{bits!s:>6} "
            f"{row['params']:>10,} {row['macs'] / 1e6:>12.2f}"
        )
    lines.append(
        f"quantized: {facts['params_share']:.2%} of the parameters, {facts['macs_share']:.2%} of "
        "the "
        "multiply-adds"
    )
    return "\n".join(lines)

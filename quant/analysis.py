"""Where and when quantization hurts: the range of every quantization point over time and channels,
the error of every layer at every step, and that of eps, all along the full-precision trajectory.

Axes: S network evaluations of a sampler ("steps"), C channels. What is measured comes as an
iterable `batches_by_step` of (step, arguments of the network) in any order, every batch at one
step; nothing of it is kept."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from base.hooks import watching
from base.network import Matmul, batch_of
from quant.layers import SWAP
from quant.network import QuantizedNet, modules_of

Batches = Iterable[tuple[int, Sequence[torch.Tensor]]]  # step, arguments of the network
Row = dict[str, Any]

DEAD = 1e-8  # a channel that never gets larger is left out of all ratios
CONSTANT = 1e-6  # deviation of ln r below which it is rounding of float32


@torch.no_grad()
def step_sqnr(record: Iterable[tuple], quantized_eps: Callable[..., torch.Tensor]) -> list[Row]:
    """record: (step, t, x, cond, eps) of a full-precision run, one after the other -> [{"step",
    "t", "sqnr_db"}].

    SQNR = 10 log10(sum eps^2 / sum (eps_q - eps)^2) over all images of a step, both networks fed
    the same x; a variance that the network learned to answer beside eps does not count."""
    sums = {}
    for step, t, x, cond, eps in record:
        error = quantized_eps(x, batch_of(t, x), cond) - eps
        signal, noise = (v[:, : x.shape[1]].double().square().sum() for v in (eps, error))
        earlier = sums.get((step, t), (0, 0))
        sums[step, t] = earlier[0] + signal, earlier[1] + noise
    return [{"step": step, "t": t, "sqnr_db": decibels(*sums[step, t])} for step, t in sums]


def decibels(signal: torch.Tensor, noise: torch.Tensor) -> float:
    """Signal to noise ratio of two sums of squares; noise counts as 1e-30 at least."""
    return float(10 * (signal / noise.clamp(min=1e-30)).log10())


# ---- ranges


@dataclass
class Ranges:
    """What passes a quantization point, over images and positions: (S, C) float32."""

    r_min: torch.Tensor
    r_max: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor

    @property
    def r_abs(self) -> torch.Tensor:
        """max |x| (S, C)."""
        return torch.maximum(-self.r_min, self.r_max)


@torch.no_grad()
def observe_ranges(net: nn.Module, batches_by_step: Batches) -> dict[str, Ranges]:
    """Ranges of every quantization point of a float network -> {point: Ranges} in execution order,
    the rows by ascending step. Memory is that of the tables, S * C numbers of each kind per point.

    Points are the input of each layer that quantization replaces, named as the layer, and both
    operands of each attention product, "NAME.ROLE". Channels are those of the layer's input; of q,
    k and v the features of each head, head by head (what a balance of q with k or of v with proj
    scales); of the softmax output the heads (what its quantizer tells apart)."""
    tables = {}  # point -> {step: (5, C)}

    def note(name, module, inputs):
        for point, x, axes in _operands(name, module, inputs):
            table, found = tables.setdefault(point, {}), moments(x, axes)
            table[step] = merged(table[step], found) if step in table else found

    with watching(net, {name: partial(note, name) for name in replaced(net)}, before=True):
        for step, arguments in batches_by_step:  # `step` is what `note` reads
            net(*arguments)
    return {point: finished(table) for point, table in tables.items()}


def replaced(net: nn.Module) -> list[str]:
    """Names of everything that quantization can replace."""
    return [name for name, module in net.named_modules() if type(module) in SWAP]


def _operands(name, module, inputs):
    """What a layer or product reads -> [(point, x, axes of x that tell its channels apart)]."""
    if not isinstance(module, Matmul):
        channels = inputs[0].dim() - 1 if isinstance(module, nn.Linear) else 1
        return [(name, inputs[0], (channels,))]
    found = []
    for side, (role, x) in enumerate(zip(module.roles, inputs)):
        x = x if x.dim() == 4 else x[:, None]  # (N, heads, rows, columns)
        # what the product sums over, but for v: rows or columns by the side of the operand
        features = 3 if (role == "v") == (side == 1) else 2
        found.append((f"{name}.{role}", x, (1,) if role == "probs" else (1, features)))
    return found


def moments(x: torch.Tensor, axes: Sequence[int]) -> torch.Tensor:
    """-> (5, C) float64: -min, max, count, sum and sum of squares over all axes but `axes`."""
    x, rest = x.float(), [axis for axis in range(x.dim()) if axis not in axes]
    var, mean = (v.double().flatten() for v in torch.var_mean(x, dim=rest, correction=0))
    count = torch.full_like(mean, x.numel() / len(mean))
    low, high = x.amin(rest).flatten(), x.amax(rest).flatten()
    return torch.stack([-low, high, count, count * mean, count * (var + mean**2)])


def merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Moments of two batches together."""
    return torch.cat([torch.maximum(a[:2], b[:2]), a[2:] + b[2:]])


def finished(table: Mapping[int, torch.Tensor]) -> Ranges:
    """{step: moments} -> Ranges."""
    rows = [table[step] for step in sorted(table)]
    low, high, count, total, squares = torch.stack(rows, dim=1).cpu()
    mean = total / count
    std = (squares / count - mean**2).clamp(min=0).sqrt()
    return Ranges(*(v.float() for v in (-low, high, mean, std)))


def range_model(r_abs: torch.Tensor) -> dict[str, Any]:
    """r_abs (S, C) -> {"mu", "a" (S,), "b" (C,), "rho"}, float64: ln r[t, c] ~ mu + a[t] + b[c] by
    two-way analysis of variance, where row and column means are the least-squares solution.

    rho = |residual|^2 / |ln r - mu|^2 in [0, 1] is the share of the variation that no product of a
    scale per step and a scale per channel explains; 0 for a constant table. Channels that are dead
    at some step are left out and have NaN in b."""
    alive = (r_abs >= DEAD).all(dim=0)
    log = r_abs[:, alive].double().log()
    mu = log.mean()
    a, b = log.mean(dim=1) - mu, log.mean(dim=0) - mu
    total, residual = ((v**2).sum() for v in (log - mu, log - mu - a[:, None] - b))
    is_constant = total <= log.numel() * CONSTANT**2
    rho = 0.0 if is_constant else float(residual / total)
    every_b = b.new_full(alive.shape, float("nan"))
    every_b[alive] = b
    return {"mu": float(mu), "a": a, "b": every_b, "rho": rho}


def temporal_variation(a: torch.Tensor) -> float:
    """V_t = standard deviation of a (S,), the log of the scale over time: 0.7 is a factor of 2."""
    return float(a.std(correction=0))


def channel_imbalance(r_abs: torch.Tensor) -> float:
    """V_c = max_c r / median_c r of the largest range over time: the factor by which one channel
    widens the scale that all share. Always dead channels do not count; NaN without others."""
    largest = r_abs.amax(dim=0)
    largest = largest[largest >= DEAD].double()
    return float(largest.max() / largest.quantile(0.5)) if len(largest) else float("nan")


def describe(r_abs: torch.Tensor) -> dict[str, float]:
    """r_abs (S, C) -> {"temporal_variation", "channel_imbalance", "rho"}."""
    model = range_model(r_abs)
    variation, imbalance = temporal_variation(model["a"]), channel_imbalance(r_abs)
    return {"temporal_variation": variation, "channel_imbalance": imbalance, "rho": model["rho"]}


def decide(
    facts: Mapping[str, float],
    *,
    segments_above: float = 0.25,
    balance_above: float = 4.0,
    by_range_above: float = 0.3,
) -> dict[str, bool]:
    """What one point asks for, by what `describe` gave -> {"segments", "balance", "by_range"}.

    segments: the scale should depend on time. At V_t = 0.25 a range two deviations up is e = 2.7
    times one two deviations down, 1.4 bits. balance: channels should be balanced. At V_c = 4 half
    of the channels leave 2 bits or more unused. by_range: time and channels do not separate, so one
    balance cannot serve all steps; rho is a share, so where V_t and V_c are small it speaks of the
    scatter of maxima alone."""
    return {
        "segments": facts["temporal_variation"] > segments_above,
        "balance": facts["channel_imbalance"] > balance_above,
        "by_range": facts["rho"] > by_range_above,
    }


# ---- errors of layers


@torch.no_grad()
def layer_errors(net: nn.Module, quantized: QuantizedNet, batches_by_step: Batches) -> list[Row]:
    """The error that each layer and attention product of `quantized` adds by itself: its output
    minus that of its original, both fed the input that the full-precision `net` has there, so that
    no error of earlier layers counts. An attention block with balanced layers counts as one: exact
    folds (quant/passes/balance.py) give its inside other scales.

    What finetune or quantization-aware training changed on purpose, biases and norms, counts as
    error here.

    -> [{"layer", "step", "t", "mse", "mae", "sqnr_db"}] by layer in execution order, then step:
    means over all images and values, SQNR of their sums. A layer that is not quantized has errors
    of exactly 0."""
    twins, sums, times = modules_of(quantized), {}, {}

    def compare(name, module, inputs, out):
        error = twins[name](*inputs).float() - out.float()
        values = error.abs(), error**2, out.float() ** 2
        found = torch.stack([v.sum(dtype=torch.float64) for v in values])
        table = sums.setdefault(name, {})
        old, count = table.get(step, (0, 0))
        table[step] = old + found, count + out.numel()

    with watching(net, {name: partial(compare, name) for name in comparable(net, twins)}):
        for step, arguments in batches_by_step:  # `step` is what `compare` reads
            times[step] = float(arguments[1][0])
            quantized.timeline.set_time(arguments[1])
            net(*arguments)
    rows = []
    for name, table in sums.items():
        for step, ((total, square, signal), count) in sorted(table.items()):
            row = {"layer": name, "step": step, "t": times[step], "mse": float(square / count)}
            row |= {"mae": float(total / count), "sqnr_db": decibels(signal, square)}
            rows.append(row)
    return rows


def comparable(net: nn.Module, twins: Mapping[str, nn.Module]) -> list[str]:
    """Names of the modules that compute what their quantized twin does, up to its error."""
    blocks = {name: twin for name, twin in twins.items() if hasattr(twin, "attention_parts")}
    folded = [name for name, twin in blocks.items() if any(map(_is_balanced, twin.modules()))]
    inside = tuple(f"{name}." for name in folded)
    return folded + [name for name in replaced(net) if not name.startswith(inside)]


def _is_balanced(module):
    return getattr(module, "inverse_balance", None) is not None

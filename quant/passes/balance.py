"""Channel-wise balancing: move the difficulty of uneven input channels into the weight.

    y = W x = (W diag(s)) (x / s),   s_c = A_c^alpha / Wmax_c^(1 - alpha)  over its geometric mean

A_c is the largest |x_c| over all time steps, Wmax_c the largest weight that reads channel c, of all
layers that share the input (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438, Eq. 4). A fixed alpha
can hurt and the error has several minima in alpha, so alpha is searched per layer with the layer's
own quantizers, the identity among the candidates: on the calibration data no layer gets worse.

Behind a norm that feeds nothing else s goes into the norm, behind v into its rows, exactly
(quant/folds.py). Behind SiLU and in the residual stream there is no exact fold: the layer
multiplies its input by 1/s (`inverse_balance`), which an integer engine does as it quantizes."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from base.network import AttentionPart, Matmul, attention_parts
from quant.calibration.dataset import CalibrationSet
from quant.folds import check_folds, fold_into_norm, scale_rows
from quant.layers import QuantLayer
from quant.network import QuantizedNet, core_of, in_full_precision, input_quantizers, quant_layers
from quant.observer import VALUES_PER_GROUP, refit
from quant.passes.declare import Moment, Plan, quant_pass
from quant.passes.job import Facts, Job
from quant.reconstruction.capture import inputs_of
from quant.timeline import Timeline

DEAD = 1e-5  # channels whose data or weights stay below take no part
LIMITS = 1e-3, 1e3  # of s, relative to its geometric mean
ROUNDING = 1e-4  # largest change of the network's answer that is float32's rounding
PRODUCT_SAMPLES = 16  # attention maps are large
CAPTURED_BYTES = 2**28  # inputs of layers that are held at a time


def balance_vector(data_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """Returns s (C,) of data_max and weight_max (C,); 1 for dead channels."""
    alive = (data_max > DEAD) & (weight_max > DEAD)
    log = alpha * data_max.clamp(min=DEAD).log() - (1 - alpha) * weight_max.clamp(min=DEAD).log()
    if not alive.any():
        return torch.ones_like(data_max)
    s = (log - log[alive].mean()).exp().clamp(*LIMITS)
    return torch.where(alive, s, torch.ones_like(s))


def channel_max(x: torch.Tensor, trailing: int) -> torch.Tensor:
    """Returns the largest |x| of each channel; `trailing` axes follow the channels."""
    return x.abs().movedim(-1 - trailing, -1).flatten(0, -2).amax(0)


def _check(plan: Plan) -> None:
    if not any(rule.get("balance") for rule in plan.rules):
        raise ValueError(
            "no layer is to be balanced; say balance: true in a rule, or leave out the pass balance"
        )


@quant_pass(
    moment=Moment.BALANCE,
    excludes={"segment_models": "segments begin with the network as it was, without balance"},
    inside_segments="it changes what scales are fitted to, also of norms, which the segments "
    "share; leave it out",
    effort={"num_values": "num_values"},
    check=_check,
)
def balance(
    job: Job, *, num_samples: int = 64, num_alphas: int = 11, num_values: int = VALUES_PER_GROUP
) -> Facts:
    """The pass, before fit_ranges. Layers whose rule says `balance: true` are balanced; attention
    blocks also fold norm -> q, k, v, q <-> k and v -> proj where these are such layers.
    `num_samples` calibration samples, spread over the time segments; `num_alphas` candidates from 0
    to 1 beside the identity; `num_values` values of an input are kept for its trial scales.

    Facts: per group of layers the chosen alpha (None: identity) and the squared error before and
    after. Raises ValueError where scales or rounding were there before, and where the network
    without quantizers is not what it was."""
    job.need_float_weights("balance")
    if any(q.is_fitted for q in input_quantizers(job.net).values()):
        raise ValueError("balance changes what scales are fitted to; list it before fit_ranges")
    timeline = job.net.timeline
    sample = job.calibration.spread(num_samples, timeline, job.seed)
    layers = {name: m for name, m in quant_layers(job.net).items() if _can_gain(m)}
    parts = [p for p in attention_parts(core_of(job.net)) if p.layers <= layers.keys()]
    shared = {name: part for part in parts for name in part.readers}
    check_folds(job.model.net, parts, sample.arguments(slice(0, 1)))
    groups = [part.readers for part in parts] + [[name] for name in layers if name not in shared]
    alphas, facts = torch.linspace(0, 1, num_alphas).tolist(), []
    segments = timeline.segments_of(sample.t)
    for names, x in _captured(job, sample, groups):
        readers, part = [layers[name] for name in names], shared.get(names[0])
        facts.append(balance_group(names, readers, x, segments, timeline, alphas, num_values))
        if part and facts[-1]["alpha"] is not None:
            fold_into_norm(job.net, part, readers)
    few = sample.thinned(job.batch(PRODUCT_SAMPLES))
    for part in parts:
        facts.append(balance_product(job, part, few))
        fold_into_values(job, part, few)
    changed = _deviation(job, sample.arguments(slice(0, job.batch(4))))
    if not changed <= ROUNDING:
        raise ValueError(
            f"balancing changed the full-precision network's answer by {changed:.1e} of its "
            "largest, which is more than rounding; set balance: false for what cannot be folded"
        )
    gained = [f["error_after"] / max(f["error_before"], 1e-30) for f in facts]
    job.log(
        f"balance: {sum(f['alpha'] is not None for f in facts)} of {len(facts)} groups balanced, "
        f"mean error {sum(gained) / max(len(gained), 1):.2f} of that without; without quantizers "
        f"the network changed by {changed:.0e}"
    )
    return facts


def _can_gain(layer):
    parts = layer.inverse_balance, layer.weight_quantizer, layer.input_quantizer
    return all(part is not None for part in parts)


@torch.no_grad()
def _deviation(job, arguments):
    """max |difference| / max |answer| of the balanced network without quantizers and the float
    network."""
    arguments = [a.to(job.device) for a in arguments]
    wanted = job.model.net(*arguments)
    with in_full_precision(job.net):
        return float((job.net(*arguments) - wanted).abs().max() / wanted.abs().max())


def _captured(job, sample, groups):
    """Yields (names, input over the sample) of each group, captured for as many groups at a time as
    memory allows."""
    todo, one = list(groups), sample.rows(torch.tensor([0]))
    first = inputs_of(job.model.net, [names[0] for names in todo], one, 1)
    size = {name: x.numel() * 4 * len(sample) for name, x in first.items()}
    while todo:
        taken, used = [], 0
        while todo and (not taken or used + size[todo[0][0]] <= CAPTURED_BYTES):
            used += size[todo[0][0]]
            taken.append(todo.pop(0))
        found = inputs_of(job.model.net, [names[0] for names in taken], sample, job.batch(32))
        yield from ((names, found[names[0]]) for names in taken)


@torch.no_grad()
def balance_group(
    names: list[str],
    layers: list[QuantLayer],
    x: torch.Tensor,
    segments: torch.Tensor,
    timeline: Timeline,
    alphas: Sequence[float],
    num_values: int = VALUES_PER_GROUP,
) -> dict[str, Any]:
    """Chooses s for layers that read the same x, and balances them; returns the fact."""
    data_max = channel_max(x, layers[0].trailing)
    of_layers = [m.weight.movedim(1, -1).flatten(0, -2).abs().amax(0) for m in layers]
    weight_max = torch.stack(of_layers).amax(0)
    targets = [m.operation(x, m.weight, None) for m in layers]
    vectors = {alpha: balance_vector(data_max, weight_max, alpha) for alpha in alphas}

    def error_of(s):
        pairs = zip(layers, targets)
        trials = (error_with(m, s, x, t, segments, timeline, num_values) for m, t in pairs)
        return sum(trials)

    alpha, fact = _best(names, {None: torch.ones_like(data_max)} | vectors, error_of)
    if alpha is not None:
        for layer in layers:
            layer.balance(vectors[alpha])
    return fact


def _best(names, vectors, error_of):
    """The key of the vector of least error, and the fact about it. The identity comes first, under
    None, and wins ties."""
    errors = {alpha: error_of(s) for alpha, s in vectors.items()}
    best = min(errors, key=errors.get)
    found = {"alpha": best, "error_before": errors[None], "error_after": errors[best]}
    return best, {"pass": "balance", "layers": names} | found


def error_with(
    layer: QuantLayer,
    s: torch.Tensor,
    x: torch.Tensor,
    target: torch.Tensor,
    segments: torch.Tensor,
    timeline: Timeline,
    num_values: int = VALUES_PER_GROUP,
) -> float:
    """Returns the squared error of the layer's product, quantized behind the balance s, per element
    of the target."""
    trial = copy.deepcopy(layer, {id(timeline): timeline, id(layer.weight): layer.weight})
    trial.bias = None
    trial.balance(s)
    trial.fit_weight()
    timeline.segment = segments if timeline.num_segments > 1 else 0
    refit(trial, x, kept=num_values)
    return float((trial(x) - target).double().square().mean())


@torch.no_grad()
def balance_product(job: Job, part: AttentionPart, sample: CalibrationSet) -> dict[str, Any]:
    """q <-> k: only their product matters, so row d of q is divided and row d of k multiplied by
    s_d = (max|q_d| / max|k_d|)^(power / 2), where that lowers the error of the quantized product;
    returns the fact."""
    q, k = inputs_of(job.model.net, [part.qk], sample, len(sample), whole=True)[part.qk]
    q_max, k_max = q.abs().amax((0, -2)), k.abs().amax((0, -1))  # ([heads,] D)
    ratio = (q_max.clamp(min=DEAD) / k_max.clamp(min=DEAD)).sqrt()
    vectors = {None: torch.ones_like(ratio)} | {power: ratio**power for power in (0.5, 1.0)}

    def error_of(s):
        left, right = q / s[..., None, :], k * s[..., :, None]
        found = quantized_product(job.net, part.qk, left, right, sample)
        return float((found - q @ k).double().square().mean())

    power, fact = _best([part.qk], vectors, error_of)
    if power is not None:
        s = vectors[power].flatten()
        scale_rows(job.net.get_submodule(part.q), part.q_rows, 1 / s)
        scale_rows(job.net.get_submodule(part.k), part.k_rows, s)
    return fact


def quantized_product(
    net: QuantizedNet, name: str, a: torch.Tensor, b: torch.Tensor, sample: CalibrationSet
) -> torch.Tensor:
    """Returns what an attention product of `net` would answer, its quantizers fitted to these
    operands."""
    product, timeline = net.get_submodule(name), net.timeline
    if isinstance(product, Matmul):  # left in floating point
        return a @ b
    few = timeline.restricted_to(sample.t)
    trial = copy.deepcopy(product, {id(timeline): few})
    for name, q in input_quantizers(trial).items():
        trial.set_submodule(name, q.unfitted(few))
    refit(trial, a, b)
    return trial(a, b)


@torch.no_grad()
def fold_into_values(job: Job, part: AttentionPart, sample: CalibrationSet) -> None:
    """v -> proj: averaging by attention is linear, so proj's 1/s can go to the rows of v. It does
    where the quantized product of attention and values gains by it, or loses nothing."""
    proj, roles = job.net.get_submodule(part.proj), job.model.net.get_submodule(part.av).roles
    inverse = proj.inverse_balance
    if bool((inverse == 1).all()):
        return
    operands = list(inputs_of(job.model.net, [part.av], sample, len(sample), whole=True)[part.av])
    wanted, at = operands[0] @ operands[1], roles.index("v")
    plain = quantized_product(job.net, part.av, *operands, sample)
    # channels of v are rows of a left operand, columns of a right one; so they are in the product
    factors = inverse.reshape(*operands[at].shape[1:-2], -1)
    factors = factors[..., :, None] if at == 0 else factors[..., None, :]
    operands[at] = operands[at] * factors
    folded = quantized_product(job.net, part.av, *operands, sample) / factors
    if (folded - wanted).square().mean() <= (plain - wanted).square().mean():
        scale_rows(job.net.get_submodule(part.v), part.v_rows, inverse)
        proj.inverse_balance = torch.ones_like(inverse)

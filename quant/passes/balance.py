"""Channel-wise balancing: move the difficulty of uneven input channels into the weight.

    y = W x = (W diag(s)) (x / s),   s_c = A_c^alpha / Wmax_c^(1 - alpha)  over its geometric mean

A_c is the largest |x_c| over all time steps, Wmax_c the largest weight that reads channel c, of all
layers that share the input (SmoothQuant, Xiao et al. 2023, arXiv:2211.10438, Eq. 4). A fixed alpha
can hurt and the error has several minima in alpha, so alpha is searched per layer with the layer's
own quantizers, the identity among the candidates: on the calibration data no layer gets worse.

Behind a norm that feeds nothing else s goes into the norm; behind v into the rows of v; both are
exact. Behind SiLU and in the residual stream there is no exact fold: the layer multiplies its input
by 1/s (`inverse_balance`), which an integer engine does in its quantize step."""

import copy

import torch
from torch import nn

from base.network import Matmul, attention_parts
from quant.network import core_of, in_full_precision, input_quantizers, quant_layers
from quant.observer import refit
from quant.reconstruction.capture import inputs_of

DEAD = 1e-5  # channels whose data or weights stay below take no part
LIMITS = 1e-3, 1e3  # of s, relative to its geometric mean
# largest change of the network's answer that is float32's rounding
SAME = 1e-4
PRODUCT_SAMPLES = 16  # attention maps are large
CAPTURED_BYTES = 2**28  # inputs of layers that are held at a time


def balance_vector(data_max, weight_max, alpha):
    """s (C,) of data_max and weight_max (C,); 1 for dead channels."""
    alive = (data_max > DEAD) & (weight_max > DEAD)
    log = alpha * data_max.clamp(min=DEAD).log() - (1 - alpha) * weight_max.clamp(min=DEAD).log()
    if not alive.any():
        return torch.ones_like(data_max)
    s = (log - log[alive].mean()).exp().clamp(*LIMITS)
    return torch.where(alive, s, torch.ones_like(s))


def channel_max(x, trailing):
    """Largest |x| of each channel; `trailing` axes follow the channels."""
    return x.abs().movedim(-1 - trailing, -1).flatten(0, -2).amax(0)


def balance(job, *, num_samples=64, num_alphas=11):
    """The pass, before fit_ranges. Layers whose rule says `balance: true` are balanced; attention
    blocks also fold norm -> q, k, v, q <-> k and v -> proj where these are such layers.
    `num_samples` calibration samples, spread over the time segments; `num_alphas` candidates from 0
    to 1 beside the identity.

    Facts: per group of layers the chosen alpha (None: identity) and the squared error before and
    after. Raises ValueError where scales or rounding were there before, and where the network
    without quantizers is not what it was."""
    job.need_float_weights("balance")
    if any(q.is_fitted for q in input_quantizers(job.net).values()):
        raise ValueError("balance changes what scales are fitted to; list it before fit_ranges")
    sample = job.calibration.spread(num_samples, job.net.timeline, job.seed)
    layers = {
        name: m
        for name, m in quant_layers(job.net).items()
        if m.inverse_balance is not None
        and m.weight_quantizer is not None
        and m.input_quantizer is not None
    }
    parts = [p for p in attention_parts(core_of(job.net)) if p.layers <= layers.keys()]
    shared = {name: part for part in parts for name in part.readers}
    check_folds(job.model.net, parts, sample.arguments(slice(0, 1)))
    groups = [part.readers for part in parts] + [[name] for name in layers if name not in shared]
    alphas, facts = torch.linspace(0, 1, num_alphas).tolist(), []
    segments = job.net.timeline.segments_of(sample.t)
    for captured in chunks(job, sample, groups):
        for names, x in captured:
            facts.append(
                balance_group(
                    names, [layers[n] for n in names], x, segments, job.net.timeline, alphas
                )
            )
            part = shared.get(names[0])
            if part and facts[-1]["alpha"] is not None:
                fold_into_norm(job.net, part, [layers[n] for n in names])
    few = sample.thinned(job.batch(PRODUCT_SAMPLES))
    for part in parts:
        facts.append(balance_product(job, part, few))
        fold_into_values(job, part, few)
    changed = deviation(job, sample.arguments(slice(0, job.batch(4))))
    if not changed <= SAME:
        raise ValueError(
            f"balancing changed the full-precision network's answer by {changed:.1e} of its "
            "largest, "
            "which is more than rounding; set balance: false for what cannot be folded"
        )
    gained = [
        f["error_after"] / max(f["error_before"], 1e-30) for f in facts if f["pass"] == "balance"
    ]
    job.log(
        f"balance: {sum(f['alpha'] is not None for f in facts)} of {len(facts)} groups balanced, "
        "mean error "
        f"{sum(gained) / max(len(gained), 1):.2f} of that without; without quantizers the network "
        "changed by "
        f"{changed:.0e}"
    )
    return facts


@torch.no_grad()
def deviation(job, arguments):
    """max |difference| / max |answer| of the balanced network without quantizers and the float
    network."""
    arguments = [a.to(job.device) for a in arguments]
    wanted = job.model.net(*arguments)
    with in_full_precision(job.net):
        return float((job.net(*arguments) - wanted).abs().max() / wanted.abs().max())


def chunks(job, sample, groups):
    """(names, input over the sample) of each group, captured for as many groups at a time as memory
    allows."""
    size = {g[0]: None for g in groups}
    first = inputs_of(job.model.net, list(size), sample.rows(torch.tensor([0])), 1)
    for name in size:
        size[name] = first[name].numel() * 4 * len(sample)
    todo = list(groups)
    while todo:
        taken, used = [], 0
        while todo and (not taken or used + size[todo[0][0]] <= CAPTURED_BYTES):
            used += size[todo[0][0]]
            taken.append(todo.pop(0))
        found = inputs_of(job.model.net, [g[0] for g in taken], sample, job.batch(32))
        yield [(g, found[g[0]]) for g in taken]


@torch.no_grad()
def balance_group(names, layers, x, segments, timeline, alphas):
    """Choose s for layers that read the same x, and balance them."""
    data_max = channel_max(x, layers[0].trailing)
    weight_max = torch.stack(
        [m.weight.movedim(1, -1).flatten(0, -2).abs().amax(0) for m in layers]
    ).amax(0)
    targets = [m.operation(x, m.weight, None) for m in layers]
    best, before = (None, None, None), None
    for alpha in [None, *alphas]:
        s = (
            torch.ones_like(data_max)
            if alpha is None
            else balance_vector(data_max, weight_max, alpha)
        )
        error = sum(
            error_with(m, s, x, target, segments, timeline) for m, target in zip(layers, targets)
        )
        before = error if before is None else before
        if best[0] is None or error < best[0]:  # the identity comes first and wins ties
            best = error, alpha, s
    if best[1] is not None:
        for layer in layers:
            layer.balance(best[2])
    return {
        "pass": "balance",
        "layers": names,
        "alpha": best[1],
        "error_before": before,
        "error_after": best[0],
    }


def error_with(layer, s, x, target, segments, timeline):
    """Squared error of the layer's product, quantized behind the balance s, per element of the
    target."""
    trial = copy.deepcopy(layer, {id(timeline): timeline, id(layer.weight): layer.weight})
    trial.bias = None
    trial.balance(s)
    trial.fit_weight()
    timeline.segment = segments if timeline.num_segments > 1 else 0
    refit(trial, x)
    return float((trial(x) - target).double().square().mean())


@torch.no_grad()
def check_folds(net, parts, arguments):
    """Raises ValueError unless the readers of each part read what its norm answers, and nothing
    else does: s goes through no activation and must meet 1/s wherever it comes."""
    modules, answers, readers = dict(net.named_modules()), {}, {part.norm: [] for part in parts}

    def answered(norm):
        # kept, so that its storage is its own
        return lambda module, inputs, out: answers.__setitem__(norm, out)

    def asked(name):
        def note(module, inputs):
            for norm, out in answers.items():
                if any(
                    x.untyped_storage().data_ptr() == out.untyped_storage().data_ptr()
                    for x in inputs
                    if torch.is_tensor(x)
                ):
                    readers[norm].append(name)

        return note

    hooks = [modules[part.norm].register_forward_hook(answered(part.norm)) for part in parts]
    hooks += [
        m.register_forward_pre_hook(asked(name))
        for name, m in modules.items()
        if not any(m.children())
    ]
    try:
        net(*(a.to(next(net.parameters()).device) for a in arguments))
    finally:
        for hook in hooks:
            hook.remove()
    for part in parts:
        if sorted(readers[part.norm]) != sorted(part.readers):
            raise ValueError(
                f"{part.norm} cannot take the balance of {', '.join(part.readers)}: what it "
                "answers is "
                f"read by {', '.join(readers[part.norm]) or 'none of the layers'}; set balance: "
                "false "
                "for them"
            )


@torch.no_grad()
def fold_into_norm(net, part, layers):
    """Take 1/s from the layers that read a norm to the norm itself: exact, as nothing lies
    between."""
    norm, inverse = net.get_submodule(part.norm), layers[0].inverse_balance
    norm.weight = nn.Parameter(norm.weight * inverse, requires_grad=False)
    if norm.bias is not None:
        norm.bias = nn.Parameter(norm.bias * inverse, requires_grad=False)
    for layer in layers:
        layer.inverse_balance = torch.ones_like(inverse)


@torch.no_grad()
def balance_product(job, part, sample):
    """q <-> k: only their product matters, so row d of q is divided and row d of k multiplied by
    s_d = (max|q_d| / max|k_d|)^(power / 2), where that lowers the error of the quantized
    product."""
    q, k = inputs_of(job.model.net, [part.qk], sample, len(sample), whole=True)[part.qk]
    q_max, k_max = q.abs().amax((0, -2)), k.abs().amax((0, -1))  # ([heads,] D)
    ratio = (q_max.clamp(min=DEAD) / k_max.clamp(min=DEAD)).sqrt()
    best, before = (None, None, None), None
    for power in (None, 0.5, 1.0):
        s = torch.ones_like(ratio) if power is None else ratio**power
        found = quantized_product(
            job.net, part.qk, q / s[..., None, :], k * s[..., :, None], sample
        )
        error = float((found - q @ k).double().square().mean())
        before = error if before is None else before
        if best[0] is None or error < best[0]:
            best = error, power, s.flatten()
    if best[1] is not None:
        scale_rows(job.net.get_submodule(part.q), part.q_rows, 1 / best[2])
        scale_rows(job.net.get_submodule(part.k), part.k_rows, best[2])
    return {
        "pass": "balance",
        "layers": [part.qk],
        "alpha": best[1],
        "error_before": before,
        "error_after": best[0],
    }


def quantized_product(net, name, a, b, sample):
    """What an attention product of `net` would answer, its quantizers fitted to these operands."""
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
def scale_rows(layer, rows, factors):
    """Multiply the rows (output channels) of a layer, and its bias, with factors (len(rows),)."""
    whole = torch.ones(layer.shape[0], device=layer.weight.device)
    whole[rows] = factors
    layer.scale_weight(whole[:, None])
    if layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias * whole, requires_grad=False)


@torch.no_grad()
def fold_into_values(job, part, sample):
    """v -> proj: averaging by attention is linear, so proj's 1/s can go to the rows of v. It does
    where the quantized product of attention and values gains by it, or loses nothing."""
    proj, roles = job.net.get_submodule(part.proj), job.model.net.get_submodule(part.av).roles
    inverse = proj.inverse_balance
    if bool((inverse == 1).all()):
        return
    operands = list(inputs_of(job.model.net, [part.av], sample, len(sample), whole=True)[part.av])
    wanted, at = operands[0] @ operands[1], roles.index("v")
    plain = quantized_product(job.net, part.av, *operands, sample)
    # Channels of v are rows of a left operand, columns of a right one; and so they are in the
    # product.
    factors = inverse.reshape(*operands[at].shape[1:-2], -1)
    factors = factors[..., :, None] if at == 0 else factors[..., None, :]
    operands[at] = operands[at] * factors
    folded = quantized_product(job.net, part.av, *operands, sample) / factors
    if (folded - wanted).square().mean() <= (plain - wanted).square().mean():
        scale_rows(job.net.get_submodule(part.v), part.v_rows, inverse)
        proj.inverse_balance = torch.ones_like(inverse)

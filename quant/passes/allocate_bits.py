"""Mixed precision: bits for every layer by its measured sensitivity, under a budget of size or of
bit operations.

    minimise    sum_l e_l(w_l) [+ e_l(a_l)]
    subject to  sum_l n_l w_l <= budget        (size: bits of weights)
            or  sum_l m_l w_l a_l <= budget    (bops: bit operations)

with one choice of weight bits w_l, and for bops of input bits a_l, for each layer of n_l weights
and m_l multiply-adds: the integer programme of HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), solved
by scipy's HiGHS. HAWQ estimates e_l by Hessians; here it is measured, the squared error of eps when
that weight or that input alone is rounded to nearest. To add them up assumes that errors of
different roundings do not correlate."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import Literal

import numpy as np
import torch

from quant.layers import QuantLayer
from quant.network import QuantizedNet, in_full_precision, quant_layers
from quant.passes.declare import DECIDES, Moment, quant_pass
from quant.passes.job import Facts, Job

BUDGETS = {"size": ("weight",), "bops": ("weight", "input")}  # what gets widths
UNITS = {"size": "bits of weights", "bops": "bit operations"}
Widths = tuple[int, ...]  # of the parts that a budget is about
Errors = dict[str, dict[str, dict[int, float]]]  # layer -> part -> bits -> squared error


@quant_pass(moment=Moment.DECIDE, once=True, one_network=True, inside_segments=DECIDES)
def allocate_bits(
    job: Job,
    *,
    budget: Literal[tuple(BUDGETS)] = "size",
    average: float | None = None,
    choices: Sequence[int] = (2, 3, 4, 6, 8),
    num_samples: int = 16,
) -> Facts:
    """The pass, before any that changes the network: choose bits out of `choices` and add a rule
    for each layer. All layers together take no more than they would with `average` bits everywhere
    (None: with the widths that the rules give them). Layers that the rules make an exception of,
    with other widths than most, keep theirs and do not count.

    Facts: first the budget, what is used of it, and the rules, as they would stand in a YAML; then
    bits and errors of every layer."""
    if not set(choices) <= set(range(2, 9)):
        raise ValueError(f"allocate_bits chooses among widths of 2 to 8 bits, not {list(choices)}")
    parts, unit = BUDGETS[budget], UNITS[budget]
    layers, usual = ordinary_layers(job.net, parts)
    sizes = {name: prod(layer.shape) for name, layer in layers.items()}
    amounts = sizes if budget == "size" else {name: job.graph.macs[name] for name in layers}
    widths = list(product(choices, repeat=len(parts)))
    costs = {name: {bits: n * prod(bits) for bits in widths} for name, n in amounts.items()}
    everywhere = prod(usual) if average is None else average ** len(parts)
    allowed = int(sum(amounts.values()) * everywhere)
    least = sum(min(row.values()) for row in costs.values())
    if least > allowed:
        raise ValueError(
            f"the budget of {allowed:,} {unit} cannot be met: with {min(choices)} bits everywhere "
            f"it takes {least:,}"
        )
    apart = sensitivities(job, layers, parts, choices, num_samples)
    errors = {name: {} for name in costs}
    for name, bits in product(costs, widths):
        errors[name][bits] = sum(apart[name][part][b] for part, b in zip(parts, bits))
    chosen = solve(errors, costs, allowed)
    used = sum(costs[name][bits] for name, bits in chosen.items())
    rules = [_rule(name, dict(zip(parts, bits))) for name, bits in chosen.items()]
    job.add_rules(rules)
    job.log(f"allocate_bits: {used:,} {unit} in {len(layers)} layers, {allowed:,} allowed")
    spent = {"budget": budget, "allowed": allowed, "used": used, "rules": rules}
    facts = [{"pass": "allocate_bits", **spent}]
    for name, bits in chosen.items():
        found = {"bits": dict(zip(parts, bits)), "errors": apart[name]}
        facts.append({"pass": "allocate_bits", "unit": name, **found})
    return facts


def _rule(name, bits):
    return {"match": name, "kind": "layer", **{part: {"bits": b} for part, b in bits.items()}}


def ordinary_layers(
    net: QuantizedNet, parts: Sequence[str]
) -> tuple[dict[str, QuantLayer], Widths]:
    """Returns (name -> layer whose `parts` have the widths that most layers have, those widths)."""
    widths = {}
    for name, layer in quant_layers(net).items():
        quantizers = [getattr(layer, f"{part}_quantizer") for part in parts]
        # An input of several widths, one for each range of steps, has found its bits already.
        if all(q is not None and not q.spec.segment_bits for q in quantizers):
            widths[name] = tuple(q.spec.bits for q in quantizers)
    if not widths:
        raise ValueError(
            f"no layer has a quantized {' and '.join(parts)} of one width, which this budget is "
            "about"
        )
    usual = Counter(widths.values()).most_common(1)[0][0]
    return {name: net.get_submodule(name) for name, own in widths.items() if own == usual}, usual


@torch.no_grad()
def sensitivities(
    job: Job,
    layers: Mapping[str, QuantLayer],
    parts: Sequence[str],
    choices: Sequence[int],
    num_samples: int,
) -> Errors:
    """Returns {layer: {part: {bits: squared error of the network's output, mean over samples}}},
    each part quantized alone."""
    sample = job.calibration.spread(num_samples, job.net.timeline, job.seed)
    batches = [[a.to(job.device) for a in batch] for batch in sample.batches(job.batch(16))]
    targets = [job.model.net(*arguments) for arguments in batches]
    errors = {name: {part: {} for part in parts} for name in layers}
    for bits in choices:
        rules = [_rule(name, dict.fromkeys(parts, bits)) for name in layers]
        net = replace(job, calibration=sample).fitted_copy(rules)
        with in_full_precision(net):
            for name, part in product(layers, parts):
                quantizer = getattr(net.get_submodule(name), f"{part}_quantizer")
                quantizer.enabled = True
                pairs = zip(batches, targets)
                differences = (net(*arguments) - target for arguments, target in pairs)
                found = sum(float(d.double().square().sum()) for d in differences)
                quantizer.enabled = False
                errors[name][part][bits] = found / len(sample)
        job.log(f"allocate_bits: measured the errors of {bits} bits in {len(layers)} layers")
    return errors


def solve(
    errors: Mapping[str, Mapping[Widths, float]],
    costs: Mapping[str, Mapping[Widths, float]],
    budget: float,
) -> dict[str, Widths]:
    """{name: {choice: error}}, {name: {choice: cost}} -> {name: choice} of least total error at no
    more cost than `budget`, which the cheapest choices keep."""
    # a second to import, which most methods have no use for
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(name, choice) for name, row in errors.items() for choice in row]
    error = np.array([errors[name][choice] for name, choice in pairs])
    cost = np.array([[float(costs[name][choice]) for name, choice in pairs]])
    one_each = np.array([[float(name == own) for own, _ in pairs] for name in errors])
    # in units of the least that is left and of the budget: the solver's tolerances are absolute
    unit = max(sum(min(row.values()) for row in errors.values()), 1e-9 * error.max(), 1e-30)
    result = milp(
        error / unit,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost / budget, 0, 1)],
    )
    if result.x is None:
        raise ValueError(f"no choice of bits keeps the budget of {budget:,} ({result.message})")
    chosen = {name: choice for (name, choice), on in zip(pairs, result.x) if on > 0.5}
    if sum(costs[name][choice] for name, choice in chosen.items()) <= budget:
        return chosen
    return solve(errors, costs, budget * (1 - 1e-6))  # the solver tolerates a little too much

"""Mixed precision: bits for every layer by its measured sensitivity, under a budget of size or of
bit operations.

    minimise  sum_l e_l(w_l) [+ e_l(a_l)]   subject to  sum_l n_l w_l <= budget            (size: bits of weights)
                                                   or   sum_l m_l w_l a_l <= budget        (bops: bit operations)

with one choice of weight bits w_l, and for bops of input bits a_l, for each layer of n_l weights
and m_l multiply-adds: the integer programme of HAWQ-V3 (Yao et al. 2021, arXiv:2011.10680), solved
by scipy's HiGHS. HAWQ estimates e_l by Hessians; here it is measured, the squared error of eps when
that weight or that input alone is rounded to nearest. The two of a layer are measured apart: for k
widths that takes 2 k runs in place of k^2, and to add them up assumes no more than to add up
layers, that errors of different roundings do not correlate."""

from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from typing import Literal

import numpy as np
import torch

from quant.network import in_full_precision, quant_layers

# what gets widths out of `choices`
BUDGETS = {"size": ("weight",), "bops": ("weight", "input")}
UNITS = {"size": "bits of weights", "bops": "bit operations"}


def allocate_bits(
    job,
    *,
    budget: Literal[tuple(BUDGETS)] = "size",
    average=None,
    choices=(2, 3, 4, 6, 8),
    num_samples=16,
):
    """The pass, before any that changes the network: choose bits out of `choices` and add a rule
    for each layer. All layers together take no more than they would with `average` bits everywhere
    (None: with the widths that the rules give them). Layers that the rules make an exception of,
    with other widths than most, keep theirs and do not count.

    Facts: first the budget, what is used of it, and the rules, as they would stand in a YAML; then
    bits and errors of every layer."""
    if not set(choices) <= set(range(2, 9)):
        raise ValueError(f"allocate_bits chooses among widths of 2 to 8 bits, not {list(choices)}")
    parts = BUDGETS[budget]
    layers, usual = ordinary_layers(job.net, parts)
    amounts = {
        name: prod(m.shape) if budget == "size" else job.graph.macs[name]
        for name, m in layers.items()
    }
    costs = {
        name: {bits: n * prod(bits) for bits in product(choices, repeat=len(parts))}
        for name, n in amounts.items()
    }
    allowed = int(
        sum(amounts.values()) * (prod(usual) if average is None else average ** len(parts))
    )
    least = sum(min(row.values()) for row in costs.values())
    if least > allowed:
        raise ValueError(
            f"the budget of {allowed:,} {UNITS[budget]} cannot be met: with {min(choices)} bits "
            f"everywhere it takes {least:,}"
        )
    apart = sensitivities(job, layers, parts, choices, num_samples)
    errors = {
        name: {bits: sum(apart[name][part][b] for part, b in zip(parts, bits)) for bits in row}
        for name, row in costs.items()
    }
    chosen = solve(errors, costs, allowed)
    used = sum(costs[name][bits] for name, bits in chosen.items())
    rules = [
        {"match": name, "kind": "layer", **{part: {"bits": b} for part, b in zip(parts, bits)}}
        for name, bits in chosen.items()
    ]
    job.add_rules(rules)
    job.log(f"allocate_bits: {used:,} {UNITS[budget]} in {len(layers)} layers, {allowed:,} allowed")
    return [
        {
            "pass": "allocate_bits",
            "budget": budget,
            "allowed": allowed,
            "used": used,
            "rules": rules,
        },
        *(
            {
                "pass": "allocate_bits",
                "unit": name,
                "bits": dict(zip(parts, bits)),
                "errors": apart[name],
            }
            for name, bits in chosen.items()
        ),
    ]


def ordinary_layers(net, parts):
    """-> (name -> layer whose `parts` have the widths that most layers have, those widths)"""
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
def sensitivities(job, layers, parts, choices, num_samples):
    """{layer: {part: {bits: squared error of the network's output, mean over samples}}}, each part
    quantized alone."""
    sample = job.calibration.spread(num_samples, job.net.timeline, job.seed)
    batches = [
        tuple(a.to(job.device) for a in arguments) for arguments in sample.batches(job.batch(16))
    ]
    targets = [job.model.net(*arguments) for arguments in batches]
    errors = {name: {part: {} for part in parts} for name in layers}
    for bits in choices:
        rules = [
            {"match": name, "kind": "layer", **{part: {"bits": bits} for part in parts}}
            for name in layers
        ]
        net = replace(job, calibration=sample).fitted_copy(rules)
        with in_full_precision(net):
            for name, part in product(layers, parts):
                quantizer = getattr(net.get_submodule(name), f"{part}_quantizer")
                quantizer.enabled = True
                found = sum(
                    float((net(*arguments) - target).double().square().sum())
                    for arguments, target in zip(batches, targets)
                )
                quantizer.enabled = False
                errors[name][part][bits] = found / len(sample)
        job.log(f"allocate_bits: measured the errors of {bits} bits in {len(layers)} layers")
    return errors


def solve(errors, costs, budget):
    """{name: {choice: error}}, {name: {choice: cost}} -> {name: choice} of least total error at no
    more cost than `budget`, which the cheapest choices keep."""
    # takes a second to import, and most methods have no use for it
    from scipy.optimize import Bounds, LinearConstraint, milp

    pairs = [(name, choice) for name, row in errors.items() for choice in row]
    error = np.array([errors[name][choice] for name, choice in pairs])
    cost = np.array([[float(costs[name][choice]) for name, choice in pairs]])
    one_each = np.array([[float(name == own) for own, _ in pairs] for name in errors])
    # In units of the least that any choice leaves and of the budget: the solver's tolerances are
    # absolute.
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
    # within the solver's tolerance is not within the budget
    return solve(errors, costs, budget * (1 - 1e-6))

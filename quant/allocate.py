"""Mixed precision of weights: bits for every layer by its measured sensitivity, under a budget of bytes.

    minimise  sum_l e_l(b_l)   subject to  sum_l n_l b_l / 8 <= budget

e_l(b) is the squared error of eps when layer l alone has b-bit weights (rounded to nearest, with the layer's own range
search), n_l its number of weights. An integer programme with one choice per layer, solved exactly (scipy's HiGHS).
"""
import copy

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from quant.convert import quant_layers


def allocate_bits(job, *, average=4.0, choices=(2, 3, 4, 6, 8), num_samples=16, batch_size=16):
    """The pass, before any that changes the network: choose weight bits out of `choices` so that they are `average`
    bits per quantized weight or less, and add a rule for each layer. Facts: bits and errors of every layer."""
    if not min(choices) <= average:
        raise ValueError(f"an average of {average} bits cannot be reached with widths of {min(choices)} bits and more")
    layers = {n: m for n, m in quant_layers(job.net).items() if m.weight_quantizer is not None}
    errors = sensitivities(job, layers, choices, num_samples, batch_size)
    sizes = {name: int(torch.Size(m.shape).numel()) for name, m in layers.items()}
    bits = solve(errors, sizes, average * sum(sizes.values()))
    job.add_rules([{"match": name, "kind": "layer", "weight": {"bits": b}} for name, b in bits.items()])
    mean = sum(sizes[name] * b for name, b in bits.items()) / sum(sizes.values())
    job.log(f"allocate_bits: {mean:.3f} bits per weight on average (at most {average})")
    return [{"pass": "allocate_bits", "unit": name, "bits": b, "errors": errors[name]} for name, b in bits.items()]


@torch.no_grad()
def sensitivities(job, layers, choices, num_samples, batch_size):
    """{layer: {bits: squared error of the network's output, mean over samples}}"""
    sample, net, device = job.calibration.spread(num_samples, job.net.timeline, job.seed), job.model.net, job.device
    batches = [tuple(a.to(device) for a in arguments) for arguments in sample.batches(batch_size)]
    targets, errors = [net(*arguments) for arguments in batches], {}
    for i, (name, layer) in enumerate(layers.items()):
        original, errors[name] = net.get_submodule(name), {}
        for bits in choices:
            trial = copy.deepcopy(layer, {id(job.net.timeline): job.net.timeline, id(layer.weight): layer.weight})
            trial.weight_quantizer = rewidth(trial.weight_quantizer, bits)
            trial.input_quantizer = None
            trial.fit_weight()
            net.set_submodule(name, trial)
            try:
                found = [float((net(*arguments) - target).double().square().sum())
                         for arguments, target in zip(batches, targets)]
            finally:
                net.set_submodule(name, original)
            errors[name][bits] = sum(found) / len(sample)
        if (i + 1) % 20 == 0 or i + 1 == len(layers):
            job.log(f"allocate_bits: sensitivity of {i + 1} of {len(layers)} layers")
    return errors


def rewidth(quantizer, bits):
    """A quantizer like this one with other bits."""
    return quantizer.unfitted(quantizer.timeline, bits=bits)


def solve(errors, sizes, budget_bits):
    """{name: {bits: error}}, {name: number of weights} -> {name: bits} of least total error within the budget."""
    pairs = [(name, bits) for name, row in errors.items() for bits in row]
    cost = np.array([errors[name][bits] for name, bits in pairs])
    names = list(errors)
    one_each = np.array([[float(name == own) for own, _ in pairs] for name in names])
    size = np.array([[float(sizes[name] * bits) for name, bits in pairs]])
    # Scaled to numbers of order one, as the solver's tolerances are absolute.
    result = milp(cost / max(cost.max(), 1e-30), integrality=np.ones(len(pairs)), bounds=Bounds(0, 1),
                  constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(size / budget_bits, 0, 1)])
    if result.x is None:
        raise ValueError(f"no choice of bits fits the budget of {budget_bits / 8:,.0f} bytes ({result.message})")
    return {name: bits for (name, bits), chosen in zip(pairs, result.x) if chosen > 0.5}

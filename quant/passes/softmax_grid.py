"""The grid of softmax outputs, chosen per layer: even steps, or powers of two, which follow the
long tail of small weights (log2 quantization of attention: Lin et al. 2022, arXiv:2111.13824)."""

import torch

from base.network import attention_parts
from quant.layers import QuantMatmul
from quant.observer import Observer
from quant.passes.declare import DECIDES, Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.quantizer import Quantizer
from quant.reconstruction.capture import inputs_of
from quant.rules import rule_for
from quant.timeline import Timeline


@quant_pass(moment=Moment.DECIDE, inside_segments=DECIDES)
def softmax_grid(job: Job, *, num_samples: int = 16) -> Facts:
    """The pass, before any that changes the network: for every attention the grid with the smaller
    ||A V - A^ V||^2 / ||A V||^2 on `num_samples` calibration samples. V is that of full precision,
    so that the error of its own grid, which both share, does not blur the choice. Adds a rule for
    each log2.

    Facts: both errors and row_drift, the mean |sum of a row of A^ - 1|, of the grid that was
    chosen."""
    spread = job.calibration.spread(num_samples, job.net.timeline, job.seed)
    sample = spread.thinned(job.batch(num_samples))
    facts, rules = [], []
    for name in (part.av for part in attention_parts(job.model.net)):
        product = job.net.get_submodule(name)
        if not isinstance(product, QuantMatmul):
            continue
        at = product.roles.index("probs")
        q = (product.a_quantizer, product.b_quantizer)[at]
        if q is None:
            continue
        operands = inputs_of(job.model.net, [name], sample, len(sample), whole=True)[name]
        errors, drifts = {}, {}
        for grid in ("uniform", "log2"):
            found = grid_error(q, grid, operands, at, job.net.timeline, sample.t)
            errors[grid], drifts[grid] = found
        best = min(errors, key=errors.get)  # the uniform one wins ties
        if best == "log2":
            rules.append(rule_for(name, "probs", "matmul") | {"input": {"grid": "log2"}})
        fact = {"pass": "softmax_grid", "unit": name, "grid": best}
        fact |= {f"error_{grid}": error for grid, error in errors.items()}
        facts.append(fact | {"row_drift": drifts[best]})
    job.add_rules(rules)
    job.log(f"softmax_grid: log2 for {len(rules)} of {len(facts)} attention maps")
    return facts


@torch.no_grad()
def grid_error(
    quantizer: Quantizer,
    grid: str,
    operands: tuple[torch.Tensor, torch.Tensor],
    at: int,
    timeline: Timeline,
    t: torch.Tensor,
) -> tuple[float, float]:
    """Returns (relative squared error of the product, mean |row sum - 1|) with the attention map,
    which is operand number `at`, on this grid; t (N,) are the steps of the samples."""
    trial = quantizer.unfitted(timeline.restricted_to(t), grid=grid)
    probs = operands[at]
    observer = Observer(trial, len(probs))
    observer.note(probs)
    observer.fit()
    quantized = list(operands)
    quantized[at] = trial(probs)
    wanted = operands[0] @ operands[1]
    error = (quantized[0] @ quantized[1] - wanted).square().sum()
    rows = quantized[at].sum(-2 if at == 1 else -1)  # a right operand is (keys, queries)
    power = wanted.square().sum().clamp(min=1e-30)
    return float(error / power), float((rows - 1).abs().mean())

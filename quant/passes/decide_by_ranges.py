"""TinyDM's range analysis as a pass: what every quantization point asks for by its ranges over time
and channels, r_abs[t, c], becomes a rule for it.

    temporal variation  V_t = std_t a_t               large: a scale for every time segment;
                                                      else one for all of them
    channel imbalance   V_c = max_c r / median_c r    large: channels are balanced (in the pass
                                                      balance); else not

with ln r_abs ~ mu + a_t + b_c (quant/analysis.py, which also says why the thresholds are what they
are). Where time and channels do not separate (rho), one balance serves no step well; balance then
finds out by the error whether it gains."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from quant.analysis import decide, describe, observe_ranges
from quant.calibration.dataset import CalibrationSet
from quant.layers import QuantLayer, QuantMatmul, QuantOperand
from quant.network import modules_of
from quant.passes.declare import DECIDES, Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.rules import rule_for


@quant_pass(moment=Moment.DECIDE, needs_segments="per_step", inside_segments=DECIDES)
def decide_by_ranges(
    job: Job, *, num_samples: int = 1024, segments_above: float = 0.25, balance_above: float = 4.0
) -> Facts:
    """The pass, before any that changes the network: measure the ranges of `num_samples`
    calibration samples through the full-precision network and add a rule for every quantized point.

    Facts: V_t, V_c and rho of every point, and what was decided. Raises ValueError on a timeline of
    one segment, where no scale depends on time."""
    timeline = job.net.timeline
    if timeline.num_segments == 1:
        raise ValueError(
            "decide_by_ranges chooses between one scale and one for each time segment, of which "
            "there is but one; set segments: per_step"
        )
    sample = job.calibration.subset(num_samples, timeline, job.seed)
    ranges = observe_ranges(job.model.net, by_segment(job, sample))
    rules, facts = [], []
    for point, rule in quantized_points(job.net).items():
        numbers = describe(ranges[point].r_abs)
        wanted = decide(numbers, segments_above=segments_above, balance_above=balance_above)
        rule |= {"input": {"static": not wanted["segments"]}}
        if rule["kind"] == "layer" and not wanted["balance"]:
            rule["balance"] = False
        rules.append(rule)
        facts.append({"pass": "decide_by_ranges", "unit": point} | numbers | wanted)
    job.add_rules(rules)
    job.log(
        f"decide_by_ranges: of {len(facts)} points {sum(f['segments'] for f in facts)} ask for a "
        f"scale of each time segment, {sum(f['balance'] for f in facts)} for balanced channels"
    )
    return facts


def by_segment(job: Job, sample: CalibrationSet) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Yields (segment, arguments of the network), every batch in one time segment."""
    segments = job.net.timeline.segments_of(sample.t)
    for s in segments.unique().tolist():
        for arguments in sample.rows((segments == s).nonzero()[:, 0]).batches(job.batch(64)):
            yield s, [a.to(job.device) for a in arguments]


def quantized_points(net: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns quantized inputs and operands, named as observe_ranges does -> the head of a rule
    that means this one."""
    found = {}
    for name, module in modules_of(net).items():
        if isinstance(module, QuantMatmul):
            for role, q in zip(module.roles, (module.a_quantizer, module.b_quantizer)):
                if q is not None:
                    found[f"{name}.{role}"] = rule_for(name, role, "matmul")
        elif isinstance(module, QuantLayer | QuantOperand) and module.input_quantizer is not None:
            found[name] = rule_for(name, module.role, "layer")
    return found

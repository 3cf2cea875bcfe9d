"""TinyDM's range analysis as a pass: what every quantization point asks for by its ranges over time
and channels, r_abs[t, c], becomes a rule for it.

    temporal variation  V_t = std_t a_t                large: a scale for every time segment; else one for all of them
    channel imbalance   V_c = max_c r / median_c r     large: channels are balanced (in the pass balance); else not

with ln r_abs ~ mu + a_t + b_c (quant/analysis.py, which also says why the thresholds are what they
are). Where time and channels do not separate (rho), one balance serves no step well; balance then
finds out by the error whether it gains."""

from quant.analysis import decide, describe, observe_ranges
from quant.layers import QuantLayer, QuantMatmul, QuantOperand
from quant.network import modules_of


def decide_by_ranges(job, *, num_samples=1024, segments_above=0.25, balance_above=4.0):
    """The pass, before any that changes the network: measure the ranges of `num_samples`
    calibration samples through the full-precision network and add a rule for every quantized point.

    Facts: V_t, V_c and rho of every point, and what was decided. Raises ValueError on a timeline of
    one segment, where no scale depends on time."""
    timeline = job.net.timeline
    if timeline.num_segments == 1:
        raise ValueError(
            "decide_by_ranges chooses between one scale and one for each time segment, of which "
            "there is "
            "but one; set segments: per_step"
        )
    sample = job.calibration.subset(num_samples, job.net.timeline, job.seed)
    ranges = observe_ranges(job.model.net, by_segment(job, sample))
    rules, facts = [], []
    for point, about in quantized_points(job.net).items():
        numbers = describe(ranges[point].r_abs)
        wanted = decide(numbers, segments_above=segments_above, balance_above=balance_above)
        balanced = {"balance": False} if about["kind"] == "layer" and not wanted["balance"] else {}
        rules.append(about | {"input": {"static": not wanted["segments"]}} | balanced)
        facts.append({"pass": "decide_by_ranges", "unit": point} | numbers | wanted)
    job.add_rules(rules)
    job.log(
        f"decide_by_ranges: of {len(facts)} points {sum(f['segments'] for f in facts)} ask for a "
        "scale of each "
        f"time segment, {sum(f['balance'] for f in facts)} for balanced channels"
    )
    return facts


def by_segment(job, sample):
    """(segment, arguments of the network), every batch in one time segment."""
    segments = job.net.timeline.segments_of(sample.t)
    for s in segments.unique().tolist():
        for arguments in sample.rows((segments == s).nonzero()[:, 0]).batches(job.batch(64)):
            yield s, [a.to(job.device) for a in arguments]


def quantized_points(net):
    """Quantized inputs and operands, named as observe_ranges does -> what a rule says to mean this
    one."""
    found = {}
    for name, module in modules_of(net).items():
        if isinstance(module, QuantMatmul):
            for role, q in zip(module.roles, (module.a_quantizer, module.b_quantizer)):
                if q is not None:
                    found[f"{name}.{role}"] = {"match": name, "kind": "matmul", "role": role}
        elif isinstance(module, (QuantLayer, QuantOperand)) and module.input_quantizer is not None:
            found[name] = {"match": name, "kind": "layer", "role": module.role}
    return found

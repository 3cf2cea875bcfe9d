"""Several models in one (segment-wise quantization; repository yeefei13/T-diffusion, without a
paper):

    eps_q(x, t) = eps of the network with (W_k, s_k),  k = #{b : b <= t},
    b the boundaries as network times

Every time segment k has its own integer weights and scales, calibrated on the steps of that segment
alone. Norms and biases are shared."""

from dataclasses import replace
from typing import Any

import torch

from quant.convert import convert
from quant.network import QuantizedNet, core_of, input_quantizers, quant_layers
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.passes.run import run_passes

TABLES = "scale", "zero_point"  # of a quantizer, a row for each segment


@quant_pass(
    moment=Moment.SEGMENT,
    once=True,
    needs_segments="3 or more",
    inside_segments="each of the segments is one alone; leave it out",
)
def segment_models(job: Job, *, passes: list[Any]) -> Facts:
    """The pass: run `passes` on one copy of the network for each segment of the timeline, then put
    the copies' weights and scales side by side. Rules say `weight: {per_segment: true}`; without it
    the weights of all copies must agree.

    Raises ValueError where a pass changed norms or biases, which the segments share."""
    timeline, facts, parts = job.net.timeline, [], []
    count = timeline.num_segments
    if count < 2:
        raise ValueError("segment_models needs several time segments; set segments: 3 or more")
    segments = timeline.segments_of(job.calibration.t)
    for s in range(count):
        rows = (segments == s).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(
                f"calibration data hold no sample in time segment {s} of {count}; add steps to "
                "the calibration set or use fewer segments"
            )
        part = replace(
            job,
            net=convert(job.model.net, job.rules),
            calibration=job.calibration.rows(rows),
            resume_folder=job.resume_folder / f"segment{s}",
            note=lambda new, done=tuple(facts): job.note([*done, *new]),
        )
        job.log(f"segment {s + 1} of {count}: {len(rows)} calibration samples")
        facts += [{"segment": s, **fact} for fact in run_passes(part, passes)]
        parts.append(part.net)
    merge(job.net, parts)
    return facts


@torch.no_grad()
def merge(net: QuantizedNet, parts: list[QuantizedNet]) -> None:
    """Makes segment s of `net` the hardened network parts[s]."""
    changed = _merge_weights(net, parts) | _merge_scales(net, parts)
    states = [core_of(part).state_dict() for part in parts]
    for name, value in core_of(net).state_dict().items():
        if name not in changed and any(not torch.equal(value, state[name]) for state in states):
            raise ValueError(
                f"a pass inside segment_models changed {name}, which the segments share; run that "
                "pass before segment_models or leave it out"
            )


def _merge_weights(net, parts):
    """Returns the names of what it changed in the state of `net`."""
    layers, changed = [quant_layers(part) for part in parts], set()
    for name, layer in quant_layers(net).items():
        if layer.weight_quantizer is None:
            continue
        sources = [each[name] for each in layers]
        kept = sources if layer.has_segments else sources[:1]
        weights = [source.weight_int for source in sources]
        if not layer.has_segments and any(not torch.equal(weights[0], w) for w in weights):
            raise ValueError(
                f"the segments have different weights in {name}; add weight: {{per_segment: true}} "
                "to its rule, or leave out what reconstructs weights"
            )
        _join(layer.weight_quantizer, [source.weight_quantizer for source in kept])
        layer.weight_int = torch.stack(weights) if layer.has_segments else weights[0].clone()
        layer.weight = None
        changed |= {f"{name}.weight_int", *(f"{name}.weight_quantizer.{key}" for key in TABLES)}
    return changed


def _merge_scales(net, parts):
    """Returns the names of what it changed in the state of `net`."""
    scales, changed = [input_quantizers(part) for part in parts], set()
    for name, q in input_quantizers(net).items():
        if q.spec.static:
            raise ValueError(
                f"{name} has one scale for all segments, which calibrate theirs apart; leave out "
                "static"
            )
        _join(q, [each[name] for each in scales])
        changed |= {f"{name}.{key}" for key in TABLES}
    return changed


def _join(quantizer, sources):
    for table in TABLES:
        joined = torch.cat([getattr(source, table) for source in sources])
        getattr(quantizer, table).copy_(joined)

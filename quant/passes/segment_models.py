"""Several models in one (segment-wise quantization; repository yeefei13/T-diffusion, without a
paper):

    eps_q(x, t) = eps of the network with (W_k, s_k),  k = #{b : b <= t},  b the boundaries as network times

Every time segment k has its own integer weights and scales, calibrated on the steps of that segment
alone. Norms and biases are shared."""

from dataclasses import replace

import torch

from quant.convert import convert
from quant.network import core_of, input_quantizers, quant_layers


def segment_models(job, *, passes):
    """The pass: run `passes` on one copy of the network for each segment of the timeline, then put
    the copies' weights and scales side by side. Rules say `weight: {per_segment: true}`; without it
    the weights of all copies must agree.

    Raises ValueError where a pass changed norms or biases, which the segments share.
    """
    from quant.passes.run import run_passes  # this is itself one of the passes

    timeline, facts, parts = job.net.timeline, [], []
    if timeline.num_segments < 2:
        raise ValueError("segment_models needs several time segments; set segments: 3 or more")
    segments = timeline.segments_of(job.calibration.t)
    for s in range(timeline.num_segments):
        rows = (segments == s).nonzero()[:, 0]
        if not len(rows):
            raise ValueError(
                f"calibration data hold no sample in time segment {s} of {timeline.num_segments}; "
                "add "
                "steps to the calibration set or use fewer segments"
            )
        part = replace(
            job,
            net=convert(job.model.net, job.rules),
            calibration=job.calibration.rows(rows),
            resume_folder=job.resume_folder / f"segment{s}",
            note=lambda new, done=tuple(facts): job.note([*done, *new]),
        )
        job.log(f"segment {s + 1} of {timeline.num_segments}: {len(rows)} calibration samples")
        facts += [{"segment": s, **fact} for fact in run_passes(part, passes)]
        parts.append(part.net)
    merge(job.net, parts)
    return facts


@torch.no_grad()
def merge(net, parts):
    """Segment s of `net` becomes the hardened network parts[s]."""
    layers, own = [quant_layers(part) for part in parts], set()
    for name, layer in quant_layers(net).items():
        if layer.weight_quantizer is None:
            continue
        q, sources = layer.weight_quantizer, [each[name] for each in layers]
        if layer.has_segments:
            q.scale.copy_(torch.cat([source.weight_quantizer.scale for source in sources]))
            q.zero_point.copy_(
                torch.cat([source.weight_quantizer.zero_point for source in sources])
            )
            weights = torch.stack([source.weight_int for source in sources])
        else:
            q.scale.copy_(sources[0].weight_quantizer.scale)
            q.zero_point.copy_(sources[0].weight_quantizer.zero_point)
            weights = sources[0].weight_int
            if any(not torch.equal(weights, source.weight_int) for source in sources):
                raise ValueError(
                    f"the segments have different weights in {name}; add weight: {{per_segment: "
                    f"true}} to "
                    "its rule, or leave out what reconstructs weights"
                )
        layer.weight_int, layer.weight = weights.clone(), None
        own |= {
            f"{name}.weight_int",
            f"{name}.weight_quantizer.scale",
            f"{name}.weight_quantizer.zero_point",
        }
    scales = [input_quantizers(part) for part in parts]
    for name, q in input_quantizers(net).items():
        if q.spec.static:
            raise ValueError(
                f"{name} has one scale for all segments, which calibrate theirs apart; leave out "
                "static"
            )
        q.scale.copy_(torch.cat([each[name].scale for each in scales]))
        q.zero_point.copy_(torch.cat([each[name].zero_point for each in scales]))
        own |= {f"{name}.scale", f"{name}.zero_point"}
    states = [core_of(part).state_dict() for part in parts]
    for name, value in core_of(net).state_dict().items():
        if name not in own and any(not torch.equal(value, state[name]) for state in states):
            raise ValueError(
                f"a pass inside segment_models changed {name}, which the segments share; run that "
                "pass "
                "before segment_models or leave it out"
            )

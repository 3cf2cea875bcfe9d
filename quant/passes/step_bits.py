"""Step-aware mixed precision of activations (PTQD, He et al. 2023, arXiv:2305.10657, Section 3.4):
few bits where the image is mostly noise, more where it is mostly signal.

    bits(t) = the smallest b with SNR_Q^b(t) > SNR_F(t), else the largest

SNR_F(t) = abar_t / (1 - abar_t) of the forward process, SNR_Q^b(t) = ||eps|| / ||eps_b - eps|| of a
network with b-bit activations and full-precision weights, along full-precision trajectories.
Neighbouring steps of the same width form one time segment."""

from collections import Counter

import torch

from quant.network import input_quantizers, quant_layers
from quant.timeline import Timeline


def step_bits(job, *, choices=(4, 6, 8), num_images=16, seed=2000):
    """The pass, before any that changes the network: cut the timeline into ranges of steps with
    their own width out of `choices`, and add the rule. Needs a network whose rules quantize inputs
    on a timeline of one segment."""
    if job.net.timeline.num_segments > 1:
        raise ValueError("step_bits makes its own time segments; leave `segments` at 1")
    choices = sorted(choices)
    noise, signal, times = {b: {} for b in choices}, {}, []
    nets = {bits: job.fitted_copy(input_rules(job.net, {"bits": bits})) for bits in choices}
    for layer in (layer for net in nets.values() for layer in quant_layers(net).values()):
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.enabled = False
    for _, t, x, cond, eps in job.trajectory(num_images, seed):
        times += [] if t in times else [t]
        eps = eps[:, : x.shape[1]]  # without a learned variance
        signal[t] = signal.get(t, 0.0) + float(eps.double().square().sum())
        for bits, net in nets.items():
            found = job.model.with_net(net).eps(
                x, torch.full((len(x),), float(t), device=x.device), cond
            )
            error = found[:, : x.shape[1]] - eps
            noise[bits][t] = noise[bits].get(t, 0.0) + float(error.double().square().sum())
    ratio = {b: {t: (signal[t] / max(noise[b][t], 1e-30)) ** 0.5 for t in times} for b in choices}
    forward = {t: forward_snr(job.model.schedule, t) for t in times}
    bits = {
        t: next((b for b in choices if ratio[b][t] > forward[t]), choices[-1])
        for t in sorted(times)
    }
    boundaries, widths = ranges_of(bits)
    job.add_rules(input_rules(job.net, {"segment_bits": widths}), Timeline(boundaries))
    job.log(
        "step_bits: "
        + ", ".join(f"{b} bits" for b in widths)
        + f" with boundaries at t = {boundaries}"
    )
    return [
        {
            "pass": "step_bits",
            "t": t,
            "bits": b,
            "snr_forward": forward[t],
            "snr_quantized": {b: ratio[b][t] for b in choices},
        }
        for t, b in bits.items()
    ]


def input_rules(net, facts):
    """Rules that give `facts` to the quantized activations of `net` but softmax outputs and
    exceptions, those of other widths than most."""
    rules, quantizers = [], input_quantizers(net)
    if not quantizers:
        raise ValueError(
            "step_bits gives widths to inputs, and none is quantized; choose bits.input below 32 "
            "or leave "
            "out step_bits"
        )
    usual = Counter(q.spec.bits for q in quantizers.values()).most_common(1)[0][0]
    for name in (name for name, q in quantizers.items() if q.spec.bits == usual):
        owner, _, part = name.rpartition(".")
        if part == "input_quantizer":
            role = net.get_submodule(owner).role
            rules.append({"match": owner, "kind": "layer", "role": role, "input": facts})
            continue
        role = net.get_submodule(owner).roles["ab".index(part[0])]
        if role != "probs":
            rules.append({"match": owner, "kind": "matmul", "role": role, "input": facts})
    return rules


def forward_snr(schedule, t):
    level = float(schedule.level(round(t / schedule.time_scale)))
    return level / max(1 - level, 1e-30)


def ranges_of(bits):
    """{t ascending: bits} -> (boundaries between neighbours of different width, width of each
    range)"""
    times, boundaries, widths = list(bits), [], []
    for i, t in enumerate(times):
        if i == 0 or bits[t] != widths[-1]:
            boundaries += [(times[i - 1] + t) / 2] if i else []
            widths.append(bits[t])
    return boundaries, widths

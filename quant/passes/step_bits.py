"""Step-aware mixed precision of activations (PTQD, He et al. 2023, arXiv:2305.10657, Section 3.4):
few bits where the image is mostly noise, more where it is mostly signal.

    bits(t) = the smallest b with SNR_Q^b(t) > SNR_F(t), else the largest

SNR_F(t) = abar_t / (1 - abar_t) of the forward process, SNR_Q^b(t) = ||eps|| / ||eps_b - eps|| of a
network with b-bit activations and full-precision weights, along full-precision trajectories.
Neighbouring steps of the same width form one time segment."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from base.network import batch_of
from quant.network import input_quantizers, quant_layers
from quant.passes.declare import DECIDES, Moment, Plan, quant_pass
from quant.passes.job import Facts, Job, NoiseSchedule
from quant.rules import rule_for
from quant.timeline import Timeline


def _check(plan: Plan | Timeline) -> None:  # either knows the number of segments
    if plan.num_segments > 1:
        raise ValueError("step_bits makes its own time segments; leave `segments` at 1")


@quant_pass(moment=Moment.DECIDE, once=True, inside_segments=DECIDES, check=_check)
def step_bits(
    job: Job, *, choices: Sequence[int] = (4, 6, 8), num_images: int = 16, seed: int = 2000
) -> Facts:
    """The pass, before any that changes the network: cut the timeline into ranges of steps with
    their own width out of `choices`, and add the rule. Needs a network whose rules quantize inputs
    on a timeline of one segment."""
    _check(job.net.timeline)
    choices = sorted(choices)
    ratio = _signal_to_noise(job, choices, num_images, seed)
    bits, facts = {}, []
    for t in sorted(ratio[choices[0]]):
        forward, quantized = forward_snr(job.model.schedule, t), {b: ratio[b][t] for b in choices}
        bits[t] = next((b for b in choices if quantized[b] > forward), choices[-1])
        ratios = {"snr_forward": forward, "snr_quantized": quantized}
        facts.append({"pass": "step_bits", "t": t, "bits": bits[t]} | ratios)
    boundaries, widths = ranges_of(bits)
    job.add_rules(input_rules(job.net, {"segment_bits": widths}), Timeline(boundaries))
    in_turn = ", ".join(f"{b} bits" for b in widths)
    job.log(f"step_bits: {in_turn} with boundaries at t = {boundaries}")
    return facts


def _signal_to_noise(job, choices, num_images, seed):
    """{bits: {t: SNR_Q}} along the trajectories of `num_images` images of `seed`."""
    noise, signal = {bits: defaultdict(float) for bits in choices}, defaultdict(float)
    nets = {bits: _with_inputs_of(job, bits) for bits in choices}
    for _, t, x, cond, eps in job.trajectory(num_images, seed):
        eps = eps[:, : x.shape[1]]  # without a learned variance
        signal[t] += float(eps.double().square().sum())
        for bits, net in nets.items():
            found = job.model.with_net(net).eps(x, batch_of(t, x), cond)
            error = found[:, : x.shape[1]] - eps
            noise[bits][t] += float(error.double().square().sum())
    return {b: {t: (signal[t] / max(noise[b][t], 1e-30)) ** 0.5 for t in signal} for b in choices}


def _with_inputs_of(job, bits):
    """The network with inputs of this width and weights in full precision."""
    net = job.fitted_copy(input_rules(job.net, {"bits": bits}))
    for layer in quant_layers(net).values():
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.enabled = False
    return net


def input_rules(net: nn.Module, spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns rules that give `spec` to the quantized activations of `net` but softmax outputs and
    exceptions, those of other widths than most."""
    rules, quantizers = [], input_quantizers(net)
    if not quantizers:
        raise ValueError(
            "step_bits gives widths to inputs, and none is quantized; choose bits.input below 32 "
            "or leave out step_bits"
        )
    usual = Counter(q.spec.bits for q in quantizers.values()).most_common(1)[0][0]
    for name in (name for name, q in quantizers.items() if q.spec.bits == usual):
        owner, _, part = name.rpartition(".")
        module = net.get_submodule(owner)
        if part == "input_quantizer":
            rules.append(rule_for(owner, module.role, "layer") | {"input": spec})
            continue
        role = module.roles["ab".index(part[0])]
        if role != "probs":
            rules.append(rule_for(owner, role, "matmul") | {"input": spec})
    return rules


def forward_snr(schedule: NoiseSchedule, t: float) -> float:
    """Returns SNR_F at the network time t."""
    level = float(schedule.level(round(t / schedule.time_scale)))
    return level / max(1 - level, 1e-30)


def ranges_of(bits: Mapping[float, int]) -> tuple[list[float], list[int]]:
    """{t ascending: bits} -> (boundaries between neighbours of different width, width of each
    range)."""
    times, boundaries, widths = list(bits), [], []
    for i, t in enumerate(times):
        if i == 0 or bits[t] != widths[-1]:
            boundaries += [(times[i - 1] + t) / 2] if i else []
            widths.append(bits[t])
    return boundaries, widths

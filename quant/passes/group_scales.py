"""Differentiable group-wise quantization (APQ-DM, Wang et al. 2024, arXiv:2305.18723): few scales
shared by all steps.

    x_q = sum_g sigma[t, g] * s_g * Phi(x / s_g),   sigma[t] = softmax(logits[t]),
    loss + lambda * H(sigma)

Phi rounds and clips. For the first half of the learning x_q is this mixture; then step t takes the
scale of its most probable group, and the scales are tuned as they will run. The steps a batch is
taken from may be chosen actively: quant/reconstruction/learn.py.

With `axis: channel`, as in the released code, every step has its own groups and assigns its
channels c to them,

    x_q[c] = sum_g sigma[t, c, g] * s[t, g] * Phi(x[c] / s[t, g]),
    sigma[t, c] = softmax(logits[t, c]).
"""

from typing import Literal

import torch
from torch import nn

from quant.network import input_quantizers
from quant.passes.declare import GIVES_SCALES, Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.quantizer import Quantizer
from quant.scales import SoftScale, attach

SHARPNESS = 2.0  # by which the initial logit of a group one gap between groups away is lower
DECIDED_FROM = 0.5  # share of the learning after which every step has one group


class GroupedScale(SoftScale):
    """Begun from a fitted `table` (segments, quantizer's groups) with `num` groups of scales.

    Axis "timestep": one set of scales for all segments, logits (segments, 1, num). Axis "channel":
    a set for each segment, logits (segments, channels, num). Scales start at even quantiles of the
    table, each entry with most of its weight on the nearest."""

    def __init__(self, table: torch.Tensor, num: int, axis: str, entropy_weight: float):
        super().__init__()
        log, self.entropy_weight = table.log(), entropy_weight
        share = (torch.arange(num, device=table.device) + 0.5) / num
        if axis == "timestep":
            scales = torch.quantile(log, share, dim=0).T[None]  # (1, groups, num)
            distance = (log[:, :, None] - scales).square().mean(1, keepdim=True)
            spread = log.amax(0) - log.amin(0)
        else:
            scales = torch.quantile(log, share, dim=1).T[:, None]  # (segments, 1, num)
            distance = (log[:, :, None] - scales).square()
            spread = log.amax(1) - log.amin(1)
        self.shape, gap = table.shape, spread.square().mean().sqrt().clamp(min=1e-6) / num
        self.log_scales = nn.Parameter(scales.clone())
        self.logits = nn.Parameter(-SHARPNESS * distance / gap**2)

    def options(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns scales and probabilities, both (segments, groups, num)."""
        shape = (*self.shape, self.logits.shape[2])
        return self.log_scales.exp().expand(shape), self.logits.softmax(2).expand(shape)

    def codes(self, quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
        """Returns codes of x in units of the table: of the mixture, until steps have one group."""
        if self.done >= DECIDED_FROM:
            return super().codes(quantizer, x)
        scales, shares = self.options()
        groups = zip(scales.unbind(2), shares.unbind(2))
        parts = (quantizer.codes_at(s, x) * quantizer.table(s * share, x) for s, share in groups)
        return sum(parts) / quantizer.table(self(), x)

    def forward(self) -> torch.Tensor:
        """Returns the table of the most probable groups, without gradient while the mixture
        learns."""
        scales, shares = self.options()
        table = scales.gather(2, shares.argmax(2, keepdim=True))[:, :, 0]
        return table if self.done >= DECIDED_FROM else table.detach()

    def entropy(self) -> torch.Tensor:
        """Returns H(sigma) of each segment (segments,), the mean over what is assigned; at most
        ln(num)."""
        return -(self.logits.softmax(2) * self.logits.log_softmax(2)).sum(2).mean(1)

    def penalty(self) -> torch.Tensor:
        """Returns lambda * H(sigma), the mean over the segments."""
        return self.entropy_weight * self.entropy().mean()


@quant_pass(moment=Moment.MODEL, needs_segments="per_step", inside_segments=GIVES_SCALES)
def group_scales(
    job: Job,
    *,
    groups: int = 8,
    axis: Literal["timestep", "channel"] = "timestep",
    entropy_weight: float = 0.8,
) -> Facts:
    """The pass: replace every fitted table by `groups` shared scales with soft assignments, which
    the reconstruction that follows learns and hardens.

    Raises ValueError before fit_ranges, for more groups than time segments on axis "timestep", and
    on axis "channel" for inputs with one scale for all channels."""
    num_segments = job.net.timeline.num_segments
    if axis == "timestep" and not 1 <= groups <= num_segments:
        raise ValueError(
            f"{groups} groups of time segments asked for, there are {num_segments}; choose at most "
            "that many"
        )
    job.need_ranges("group_scales")
    for name, q in input_quantizers(job.net).items():
        if axis == "channel" and q.scale.shape[1] == 1 and not q.spec.static:
            raise ValueError(
                f"group_scales puts channels into groups, but {name} has one scale for all of "
                "them; give the inputs of its rule per: channel, or choose axis: timestep"
            )
    count = attach(job.net, lambda q: GroupedScale(q.scale.detach(), groups, axis, entropy_weight))
    return [{"pass": "group_scales", "inputs": count, "groups": groups}]

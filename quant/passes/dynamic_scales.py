"""Temporal dynamic quantization (TDQ, So et al. 2023, arXiv:2306.02316): an activation's scale as a
function of time.

    s(t) = softplus(MLP(gamma(t))),  gamma the sinusoidal embedding of t

A continuous function gets gradients from all steps, where a free scale per step gets few. Evaluated
at the sampler's steps it is a table, which is what runs; evaluated at other steps it is the table
of another step count."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from base.network import timestep_embedding
from quant.network import QuantizedNet, input_quantizers
from quant.passes.declare import GIVES_SCALES, Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.scales import SoftScale, attach
from quant.timeline import PER_STEP, Timeline, segment_boundaries

EMBEDDING = 128  # width of gamma(t)


class DynamicScale(SoftScale):
    """MLP of `depth` linear layers, He-initialised, for `times`: (segments,), or (N,) when each
    sample of a batch has a row of its own (quant/qat.py). Without dropout (the released code has
    it, and draws random scales while training). The last layer starts at zero weight: s(t) =
    `start` (groups,) for every t."""

    def __init__(self, times: torch.Tensor, start: torch.Tensor, hidden: int = 64, depth: int = 4):
        super().__init__()
        widths = [EMBEDDING, *[hidden] * (depth - 1), len(start)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        for layer in self.layers[:-1]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[-1].weight)
        self.layers[-1].bias.data = start.double().expm1().log().float()  # softplus^-1
        self.times = times  # no buffer: a batch is no state, and is not averaged or saved

    def at(self, times: torch.Tensor) -> torch.Tensor:
        """times (S,) -> scales (S, groups), in float32 under autocast too."""
        device = self.layers[-1].bias.device
        with torch.autocast(device.type, enabled=False):
            h = timestep_embedding(times.to(device), EMBEDDING, cos_first=True)
            for layer in self.layers[:-1]:
                h = F.relu(layer(h))
            return F.softplus(self.layers[-1](h))

    def forward(self) -> torch.Tensor:
        """Returns the table at its own times."""
        return self.at(self.times)


@quant_pass(
    moment=Moment.MODEL,
    needs_segments="per_step",
    excludes={"group_scales": "both give the scales"},
    inside_segments=GIVES_SCALES,
)
def dynamic_scales(
    job: Job, *, hidden: int = 64, depth: int = 4, warm_steps: int = 300, warm_lr: float = 1e-3
) -> Facts:
    """The pass: replace the fitted table of every activation quantizer by an MLP that follows it,
    by regression of ln s(t) on the table, `warm_steps` Adam steps; what comes after (reconstruct)
    learns the MLP. Scales must have been fitted, on a timeline of several segments."""
    job.need_ranges("dynamic_scales")
    times = job.net.timeline.segment_times(job.calibration.t)
    errors = []

    def make(q):
        table = q.scale.detach()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(job.seed)
            mean = table.log().mean(0).exp().cpu()
            soft = DynamicScale(times, mean, hidden, depth).to(table.device)
        optimizer = torch.optim.Adam(soft.parameters(), lr=warm_lr)
        for _ in range(warm_steps):
            loss = (soft().log() - table.log()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            errors.append(float((soft().log() - table.log()).square().mean().sqrt()))
        return soft

    count = attach(job.net, make)
    deviation = sum(errors) / max(count, 1)
    return [{"pass": "dynamic_scales", "inputs": count, "mean_log_deviation": deviation}]


def functions_of(net: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of the MLPs that gave a hardened network its tables, by quantizer:
    {"NAME|layers.0.weight": ...}."""
    found = {}
    for name, q in input_quantizers(net).items():
        if isinstance(q.made_by, DynamicScale):
            found |= {f"{name}|{key}": value for key, value in q.learned_by().items()}
    return found


@torch.no_grad()
def retabulated(
    net: QuantizedNet, functions: dict[str, torch.Tensor], times: Iterable[float]
) -> QuantizedNet:
    """Gives the hardened network tables for other network times (S,). Quantizers without a
    function, all zero points and the bypass of the input take those of the nearest old step; static
    ones stay. Raises ValueError for functions of another network."""
    quantizers, by_name = input_quantizers(net), {}
    for key, value in functions.items():
        name, _, part = key.partition("|")
        by_name.setdefault(name, {})[part] = value
    unknown = sorted(by_name.keys() - quantizers.keys())
    if not functions or unknown:
        raise ValueError(
            "the functions of time do not belong to this network "
            f"({', '.join(unknown[:3]) or 'none'}); use the files of one run"
        )
    times = torch.tensor(sorted(map(float, times)))
    nearest = net.timeline.segments_of(times).tolist()
    net.timeline.boundaries = Timeline(segment_boundaries(times.tolist(), PER_STEP)).boundaries
    for name, q in quantizers.items():
        if q.spec.static:
            continue
        table = _evaluated(by_name[name], times) if name in by_name else q.scale[nearest]
        q.scale, q.zero_point = nn.Parameter(table, requires_grad=False), q.zero_point[nearest]
        q.bits = [q.bits[i] for i in nearest]
    if net.bypass is not None:
        net.bypass.gain = net.bypass.gain[nearest]
    return net


def _evaluated(parameters, times):
    """Scales (S, groups) that the MLP with these parameters gives."""
    widths = [value.shape[0] for key, value in parameters.items() if key.endswith("bias")]
    soft = DynamicScale(times, torch.ones(widths[-1]), widths[0], len(widths))
    soft.load_state_dict(parameters)
    return soft()


def retimed(rules: Iterable[dict[str, Any]], nearest: Sequence[int]) -> list[dict[str, Any]]:
    """Returns the rules for a network whose segment i has become what segment nearest[i] was: those
    with widths by segment change."""
    result = []
    for rule in rules:
        widths = rule.get("input", {}).get("segment_bits")
        if widths:
            rule = rule | {"input": rule["input"] | {"segment_bits": [widths[i] for i in nearest]}}
        result.append(rule)
    return result

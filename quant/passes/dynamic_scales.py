"""Temporal dynamic quantization (TDQ, So et al. 2023, arXiv:2306.02316): an activation's scale as a
function of time.

    s(t) = softplus(MLP(gamma(t))),  gamma the sinusoidal embedding of t

A continuous function gets gradients from all steps, where a free scale per step gets few. Evaluated
at the sampler's steps it is a table, which is what runs; evaluated at other steps it is the table
of another step count."""

import torch
import torch.nn.functional as F
from torch import nn

from base.network import timestep_embedding
from quant.network import input_quantizers
from quant.scales import SoftScale, attach
from quant.timeline import PER_STEP, Timeline, segment_boundaries

EMBEDDING = 128  # width of gamma(t)


class DynamicScale(SoftScale):
    """MLP of `depth` linear layers, He-initialised, for `times`: (segments,), or (N,) when each
    sample of a batch has a row of its own (quant/qat.py). Without dropout (the released code has
    it, and draws random scales while training). The last layer starts at zero weight: s(t) =
    `start` (groups,) for every t."""

    def __init__(self, times, start, hidden=64, depth=4):
        super().__init__()
        widths = [EMBEDDING, *[hidden] * (depth - 1), len(start)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        for layer in self.layers[:-1]:
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.layers[-1].weight)
        self.layers[-1].bias.data = start.double().expm1().log().float()  # softplus^-1
        # no buffer: a batch is no state, and is not averaged or saved
        self.times = times

    def at(self, times):
        """times (S,) -> scales (S, groups), in float32 under autocast too."""
        device = self.layers[-1].bias.device
        with torch.autocast(device.type, enabled=False):
            h = timestep_embedding(times.to(device), EMBEDDING, cos_first=True)
            for layer in self.layers[:-1]:
                h = F.relu(layer(h))
            return F.softplus(self.layers[-1](h))

    def forward(self):
        return self.at(self.times)


def dynamic_scales(job, *, hidden=64, depth=4, warm_steps=300, warm_lr=1e-3):
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
            soft = DynamicScale(times, table.log().mean(0).exp().cpu(), hidden, depth).to(
                table.device
            )
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
    return [
        {
            "pass": "dynamic_scales",
            "inputs": count,
            "mean_log_deviation": sum(errors) / max(count, 1),
        }
    ]


def functions_of(net):
    """Parameters of the MLPs that gave a hardened network its tables, by quantizer:
    {"NAME|layers.0.weight": ...}."""
    return {
        f"{name}|{key}": value
        for name, q in input_quantizers(net).items()
        if isinstance(q.made_by, DynamicScale)
        for key, value in q.learned_by().items()
    }


@torch.no_grad()
def retabulated(net, functions, times):
    """The hardened network with tables for other network times (S,). Quantizers without a function,
    all zero points and the bypass of the input take those of the nearest old step; static ones
    stay. Raises ValueError for functions of another network."""
    quantizers = input_quantizers(net)
    unknown = sorted({key.partition("|")[0] for key in functions} - quantizers.keys())
    if not functions or unknown:
        raise ValueError(
            "the functions of time do not belong to this network "
            f"({', '.join(unknown[:3]) or 'none'}); "
            "use the files of one run"
        )
    times = torch.tensor(sorted(map(float, times)))
    nearest = net.timeline.segments_of(times).tolist()
    net.timeline.boundaries = Timeline(segment_boundaries(times.tolist(), PER_STEP)).boundaries
    for name, q in quantizers.items():
        if q.spec.static:
            continue
        own = {
            key.partition("|")[2]: v
            for key, v in functions.items()
            if key.partition("|")[0] == name
        }
        table = q.scale[nearest]
        if own:
            widths = [v.shape[0] for key, v in own.items() if key.endswith("bias")]
            soft = DynamicScale(times, torch.ones(widths[-1]), widths[0], len(widths))
            soft.load_state_dict(own)
            table = soft()
        q.scale, q.zero_point = nn.Parameter(table, requires_grad=False), q.zero_point[nearest]
        q.bits = [q.bits[i] for i in nearest]
    if net.bypass is not None:
        net.bypass.gain = net.bypass.gain[nearest]
    return net


def retimed(rules, nearest):
    """Rules for a network whose segment i has become what segment nearest[i] was: those with widths
    by segment."""
    return [
        rule
        | {
            "input": rule["input"]
            | {"segment_bits": [rule["input"]["segment_bits"][i] for i in nearest]}
        }
        if rule.get("input", {}).get("segment_bits")
        else rule
        for rule in rules
    ]

"""The temporal information block (TFMQ-DM, Huang et al. 2024, arXiv:2311.16503): the layers that
see nothing but the time step, i.e. the embedding's MLP and every block's projection of it, are
reconstructed together and first.

    L = sum over blocks lp(e_i^q(t), e_i(t); 2) + rounding penalty

The steps of a sampler are a finite set, so the whole input of these layers is known."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from base.config import Share
from base.seeds import mix
from quant.network import core_of, modules_of, quant_layers, set_input_quantization
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.reconstruction.learn import Lesson, change_of_error, learn_rounding, measured
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.unit import Unit, load_unit, save_unit

ROLES = ("temb", "emb_proj")


class TemporalBlock(nn.Module):
    """t (N,)[, condition] -> the projections of the time embedding of all blocks, side by side (N,
    sum of C)."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.__dict__["embed_time"] = core_of(net).embed_time
        modules = modules_of(net).items()
        found = {name: m for name, m in modules if getattr(m, "role", None) == "emb_proj"}
        self.projections = _by_name(found)

    def forward(self, t: torch.Tensor, *cond: torch.Tensor) -> torch.Tensor:
        """Runs the embedding, then every projection."""
        emb = F.silu(self.embed_time(t, *cond))
        return torch.cat([projection(emb) for projection in self.projections.values()], dim=1)


def _by_name(modules):
    return nn.ModuleDict({name.replace(".", "|"): m for name, m in modules.items()})


@quant_pass(
    moment=Moment.TEMPORAL,
    effort={"iters": "weight_iters", "lr": "weight_lr", "batch_size": "batch_size"},
)
def reconstruct_temporal(
    job: Job,
    *,
    iters: int = 20000,
    lr: float = 1e-3,
    batch_size: int = 32,
    round_weight: float = 0.01,
    warmup: Share = 0.2,
    beta_start: float = 20.0,
    beta_end: float = 2.0,
) -> Facts:
    """The pass: AdaRound on the temporal layers, which are hard afterwards; `reconstruct` then
    leaves them alone."""
    path = job.resume_folder / "temporal.safetensors"
    layers = {n: m for n, m in quant_layers(job.net).items() if m.role in ROLES}
    layers = {n: m for n, m in layers.items() if m.weight_quantizer is not None}
    if not layers:
        raise ValueError(
            "no quantized layer has the role temb or emb_proj; leave reconstruct_temporal out"
        )
    job.need_ranges("reconstruct_temporal")
    job.need_float_weights("reconstruct_temporal")
    holder = _by_name(layers)
    facts = load_unit(holder, path)
    if facts is not None:
        job.log("temporal information block: learned already")
        return facts
    inputs = distinct_times(job)
    with torch.no_grad():
        target = TemporalBlock(job.model.net)(*(a.to(job.device) for a in inputs))
    unit = Unit("temporal", TemporalBlock(job.net), job.device, lambda rows: None)
    schedule = Schedule(iters, batch_size=batch_size, weight_lr=lr, warmup=warmup)
    schedule = replace(schedule, beta_start=beta_start, beta_end=beta_end)
    generator = torch.Generator().manual_seed(mix(job.seed, -1))
    objective = Objective(round_weight=round_weight)
    lesson = Lesson(unit, inputs, target, generator, objective, schedule)
    learn = partial(learn_rounding, lesson, list(layers.values()))
    set_input_quantization(job.net, False)
    try:
        facts = [measured("reconstruct_temporal", "weight", lesson, learn)]
    finally:
        set_input_quantization(job.net, True)
    job.log(f"temporal information block: {change_of_error(facts[0])}")
    save_unit(holder, path, facts)
    return facts


def distinct_times(job: Job) -> list[torch.Tensor]:
    """Returns the network's arguments without x, one row for each distinct time (and class label,
    where it takes labels)."""
    labels = getattr(job.model.net, "num_classes", None) is not None
    rows, seen = [], set()
    for i, t in enumerate(job.calibration.t.tolist()):
        key = (t, int(job.calibration.which[i])) if labels else t
        if key not in seen:
            seen.add(key)
            rows.append(i)
    arguments = job.calibration.arguments(torch.tensor(rows))
    return list(arguments[1:] if labels else arguments[1:2])

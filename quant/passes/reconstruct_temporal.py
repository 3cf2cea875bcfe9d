"""The temporal information block (TFMQ-DM, Huang et al. 2024, arXiv:2311.16503): the layers that
see nothing but the time step, i.e. the embedding's MLP and every block's projection of it, are
reconstructed together and first.

    L = sum over blocks lp(e_i^q(t), e_i(t); 2) + rounding penalty

The steps of a sampler are a finite set, so the whole input of these layers is known.
"""

import time

import torch
import torch.nn.functional as F

from base.seeds import mix
from quant.network import core_of, modules_of, quant_layers, set_input_quantization
from quant.reconstruction.learn import learn_rounding
from quant.reconstruction.unit import Unit, load_unit, relative_error, save_unit

ROLES = ("temb", "emb_proj")


class TemporalBlock(torch.nn.Module):
    """t (N,)[, condition] -> the projections of the time embedding of all blocks, side by side (N,
    sum of C)."""

    def __init__(self, net):
        super().__init__()
        self.__dict__["embed_time"] = core_of(net).embed_time
        self.projections = torch.nn.ModuleDict(
            {
                name.replace(".", "|"): m
                for name, m in modules_of(net).items()
                if getattr(m, "role", None) == "emb_proj"
            }
        )

    def forward(self, t, *cond):
        emb = F.silu(self.embed_time(t, *cond))
        return torch.cat([projection(emb) for projection in self.projections.values()], dim=1)


def reconstruct_temporal(
    job,
    *,
    iters=20000,
    lr=1e-3,
    batch_size=32,
    round_weight=0.01,
    warmup=0.2,
    beta_start=20.0,
    beta_end=2.0,
):
    """The pass: AdaRound on the temporal layers, which are hard afterwards; `reconstruct` then
    leaves them alone."""
    path = job.resume_folder / "temporal.safetensors"
    layers = {
        n: m
        for n, m in quant_layers(job.net).items()
        if m.role in ROLES and m.weight_quantizer is not None
    }
    if not layers:
        raise ValueError(
            "no quantized layer has the role temb or emb_proj; leave reconstruct_temporal out"
        )
    job.need_ranges("reconstruct_temporal")
    job.need_float_weights("reconstruct_temporal")
    holder = torch.nn.ModuleDict({name.replace(".", "|"): m for name, m in layers.items()})
    facts = load_unit(holder, path) if path.is_file() else None
    if facts is not None:
        job.log("temporal information block: learned already")
        return facts
    started, settings = (
        time.monotonic(),
        dict(
            weight_iters=iters,
            weight_lr=lr,
            batch_size=batch_size,
            round_weight=round_weight,
            warmup=warmup,
            beta_start=beta_start,
            beta_end=beta_end,
            weight_norm=2.0,
            layer_weight=0.0,
            bfloat16=False,
            weight_cosine=False,
            gptq=False,
        ),
    )
    inputs = distinct_times(job)
    device = next(job.net.parameters()).device
    with torch.no_grad():
        target = TemporalBlock(job.model.net)(*(a.to(device) for a in inputs))
    unit = Unit("temporal", TemporalBlock(job.net), device, lambda rows: None)
    set_input_quantization(job.net, False)
    try:
        before = relative_error(unit, inputs, target)
        learn_rounding(
            unit,
            list(layers.values()),
            inputs,
            target,
            torch.Generator().manual_seed(mix(job.seed, -1)),
            settings,
        )
        after = relative_error(unit, inputs, target)
    finally:
        set_input_quantization(job.net, True)
    facts = [
        {
            "pass": "reconstruct_temporal",
            "stage": "weight",
            "unit": "temporal",
            "error_before": before,
            "error_after": after,
            "seconds": time.monotonic() - started,
        }
    ]
    job.log(f"temporal information block: weight error {before:.2e} -> {after:.2e}")
    save_unit(holder, path, facts)
    return facts


def distinct_times(job):
    """The network's arguments without x, one row for each distinct time (and class label, where it
    takes labels)."""
    labels = getattr(job.model.net, "num_classes", None) is not None
    rows, seen = [], set()
    for i, t in enumerate(job.calibration.t.tolist()):
        key = (t, int(job.calibration.which[i])) if labels else t
        if key not in seen:
            seen.add(key)
            rows.append(i)
    arguments = job.calibration.arguments(torch.tensor(rows))
    return list(arguments[1:] if labels else arguments[1:2])

"""Fine-tuning of the whole quantized network towards the full-precision one; integer weights stay
as they are.

    minimise E [ mean_k ||e_k||^2 + ||sum_k e_k||^2 / K ] / 2,
    e_k = (eps_q(x_k, t_k) - eps(x_k, t_k)) / b(t_k)

over stretches of K successive calibration samples x_1 .. x_K of one trajectory; ||.||^2 is the mean
square of all that the network answers, a learned variance included, and b(t) the root mean square
of the error at t before the pass. Without b the last steps, where eps is least exact (a hundred
times the mean square of the first steps at W4A4), would be learned at the cost of the first, whose
errors count most for the image. The second term is what the sampler sums up: errors that are alike
from step to step make more of the image's error than as large ones that are not. Where successive
errors are independent both terms are alike, 1 before the pass.

What block reconstruction leaves of the units' errors adds up along the network. Here all that is
not an integer is learned together against the network's answer: scales of activations and of
weights, biases, and the affine parameters of norms (selective fine-tuning as in QuEST, Wang et al.
2024, arXiv:2402.03666; the error of the whole network as in APQ-DM, arXiv:2305.18723). All of it is
stored anyway and costs nothing at run time."""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from base.files import load_tensors, save_tensors
from base.workers import first_only
from quant.network import harden, input_quantizers, quant_layers
from quant.passes.declare import Moment, quant_pass
from quant.passes.job import Facts, Job
from quant.reconstruction.settings import Dtype

NORMS = (nn.GroupNorm, nn.LayerNorm)
ERROR_SAMPLES = 256  # on which the error before and after is measured
SMALLEST = 1e-8  # scale
SAVED_EVERY = 50  # steps


@quant_pass(
    moment=Moment.FINISH,
    one_network=True,
    effort={"iters": "weight_iters", "batch_size": "batch_size", "dtype": "dtype"},
    inside_segments="it changes norms and biases, which the segments share; leave it out",
)
def finetune(
    job: Job,
    *,
    iters: int = 500,
    scale_lr: float = 1e-3,
    bias_lr: float = 1e-3,
    stretch: int = 8,
    batch_size: int = 16,
    dtype: Dtype = "fp32",
) -> Facts:
    """The pass, after those that fit and reconstruct: `iters` Adam steps under a cosine schedule.
    `scale_lr` is relative to the mean of a table of scales; `bias_lr`, of biases and norms, is
    absolute. A batch is made of stretches of `stretch` samples (K above; fewer where no trajectory
    has as many), one at least. `dtype: bf16` computes under autocast.

    Weights are hardened first. Tables of scales that a function of time or groups gave
    (dynamic_scales, group_scales) stay as these gave them. If the error has not fallen in the end
    (that of 8 bits leaves little to learn), all is put back as it was. The state is saved in
    `job.resume_folder` on the way; a run that is killed and started again ends in the same bytes.

    Returns one fact: the objective before and after. Raises ValueError before fit_ranges, for a
    network with own weights for every time segment, and where the calibration file does not tell
    trajectories."""
    options = {key: value for key, value in locals().items() if key != "job"}
    job.need_ranges("finetune")
    if any(layer.has_segments for layer in quant_layers(job.net).values()):
        raise ValueError(
            "finetune learns one network for all steps, this one has own weights for every time "
            "segment; leave out finetune, or segment_models and per_segment"
        )
    harden(job.net)
    stretches = job.calibration.stretches(stretch)
    each = max(1, batch_size // stretches.shape[1])  # stretches in a batch
    batches = pick_batches(stretches, each, job.seed)
    errors = errors_of(job, batches)
    level = rms_by_step(job.calibration.t, batches, errors)
    before = mean_objective(errors, batches, level)
    groups = learned(job.net, scale_lr, bias_lr)
    path, begun = job.resume_folder / "finetune.safetensors", {"options": options, "error": before}
    parameters = [p for group in groups for p in group["params"]]
    generator = torch.Generator().manual_seed(job.seed)
    state = State(path, begun, parameters, torch.optim.Adam(groups), generator)
    original = [parameter.detach().clone() for parameter in parameters]

    def loss(generator):
        rows = stretches[torch.randint(len(stretches), (each,), generator=generator)]
        return objective(eps_error(job, rows, dtype), level[rows])

    _optimise(state, iters, loss, job.log)
    after = mean_objective(errors_of(job, batches), batches, level)
    if not after < before:  # nor where it has become NaN
        after = before
        for parameter, value in zip(parameters, original):
            parameter.copy_(value)
    errors = {"error_before": before, "error_after": after}
    return [{"pass": "finetune", "unit": "whole network", **errors}]


@dataclass
class State:
    """What is learned, and what a saved one must have been begun with to be continued."""

    path: Path
    begun: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Adam
    generator: torch.Generator

    @first_only
    def save(self, step: int) -> None:
        """Writes the state after `step` steps."""
        tensors = {"generator": self.generator.get_state()}
        for i, parameter in enumerate(self.parameters):
            tensors[f"{i}"] = parameter.data
            values = self.optimizer.state[parameter]
            tensors |= {f"{i}.{key}": value for key, value in values.items()}
        save_tensors(self.path, tensors, self.begun | {"step": step})

    def load(self) -> int:
        """Goes on from what was saved, if that began alike; returns the steps done."""
        tensors, saved = load_tensors(self.path) if self.path.is_file() else ({}, {})
        if {key: saved.get(key) for key in self.begun} != self.begun:
            return 0
        self.generator.set_state(tensors.pop("generator"))
        for i, parameter in enumerate(self.parameters):
            parameter.data.copy_(tensors[f"{i}"])
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if f"{i}.{key}" in tensors:
                    device = "cpu" if key == "step" else parameter.device
                    self.optimizer.state[parameter][key] = tensors[f"{i}.{key}"].to(device)
        return saved["step"]


def _optimise(state, iters, loss_of, log):
    """Adam steps from where the state stands to `iters`; the parameters are then at rest."""
    started, optimizer = time.monotonic(), state.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    scales = [p for group in optimizer.param_groups[1:] for p in group["params"]]
    done = state.load()
    for step in range(done + 1, iters + 1):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 + math.cos(math.pi * (step - 1) / iters)) / 2
        loss = loss_of(state.generator)
        grads = torch.autograd.grad(loss, state.parameters, allow_unused=True)
        for parameter, grad in zip(state.parameters, grads):
            parameter.grad = grad
        optimizer.step()
        for scale in scales:
            scale.data.clamp_(min=SMALLEST)
        if step % SAVED_EVERY == 0 or step == iters:
            state.save(step)
            left = (time.monotonic() - started) * (iters - step) / (step - done)
            said = f"error {loss.item():.3f}, about {left:.0f} s left"
            log(f"finetune: step {step} of {iters}, {said}")
    for parameter in state.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None


def learned(net: nn.Module, scale_lr: float, bias_lr: float) -> list[dict[str, Any]]:
    """Returns optimizer groups: first biases and norms, set apart from the float network, which
    shared them; then each table of scales."""
    layers, shifts = quant_layers(net).values(), []
    for module in net.modules():
        names = ("weight", "bias") if isinstance(module, NORMS) else ("bias",) * (module in layers)
        for name in names:
            value = getattr(module, name)
            if value is not None:
                setattr(module, name, nn.Parameter(value.detach().clone()))
                shifts.append(getattr(module, name))
    quantizers = [q for q in input_quantizers(net).values() if q.learnable and q.made_by is None]
    quantizers += [layer.weight_quantizer for layer in layers if layer.weight_quantizer is not None]
    groups = [{"params": shifts, "lr": bias_lr}]
    for q in quantizers:
        rate = scale_lr * q.scale.mean().item()
        groups.append({"params": [q.scale.requires_grad_(True)], "lr": rate})
    return groups


def eps_error(job: Job, rows: torch.Tensor, dtype: Dtype = "fp32") -> torch.Tensor:
    """Returns eps_q - eps of the calibration samples `rows` (M, K) -> (M, K, values)."""
    arguments = [a.to(job.device) for a in job.calibration.arguments(rows.flatten())]
    with torch.no_grad():
        target = job.model.net(*arguments)
    with torch.autocast(job.device.type, torch.bfloat16, enabled=dtype == "bf16"):
        found = job.net(*arguments)
    return (found.float() - target).flatten(1).unflatten(0, rows.shape)


def objective(errors: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """Returns the objective of errors (M, K, values) and b (M, K)."""
    e = errors / level.to(errors.device)[:, :, None]
    return (e.square().mean() + (e.sum(1) / e.shape[1] ** 0.5).square().mean()) / 2


def pick_batches(stretches: torch.Tensor, each: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Draws about ERROR_SAMPLES samples, in batches of `each` stretches (M, K)."""
    order = torch.randperm(len(stretches), generator=torch.Generator().manual_seed(seed))
    return stretches[order[: max(1, ERROR_SAMPLES // stretches.shape[1])]].split(each)


@torch.no_grad()
def errors_of(job: Job, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Returns the errors of eps of every batch of samples (M, K)."""
    return [eps_error(job, rows).cpu() for rows in batches]


def rms_by_step(
    t: torch.Tensor, batches: Iterable[torch.Tensor], errors: Iterable[torch.Tensor]
) -> torch.Tensor:
    """Returns b at the step of every calibration sample, t (N,) -> (N,), interpolated between those
    of the `batches`, whose errors these are."""
    squares = torch.cat([e.square().mean(2).flatten() for e in errors])
    seen, at = t[torch.cat(tuple(batches)).flatten()].unique(return_inverse=True)
    mean = torch.zeros(len(seen)).index_add(0, at, squares) / at.bincount()
    everywhere = torch.from_numpy(np.interp(t.numpy(), seen.numpy(), mean.numpy()))
    return everywhere.float().clamp(min=SMALLEST**2).sqrt()


def mean_objective(
    errors: Iterable[torch.Tensor], batches: Iterable[torch.Tensor], level: torch.Tensor
) -> float:
    """Returns the objective over all of `batches`."""
    total = sum(len(rows) * float(objective(e, level[rows])) for e, rows in zip(errors, batches))
    return total / sum(map(len, batches))

"""Ties fixture runs of samplers and schedules to the library: `sample` and `schedule` read a run's
description, nothing more. Used by the tests here and by an outside checker that brings runs of its
own."""

import sys
from pathlib import Path

import torch

from ddim.dpm_solver import dpm_solver
from ddim.sampler import ddim, ddpm, plms
from ddim.schedule import make_betas, make_schedule, step_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VARIANCES = {"learned_range": "learned", "fixed_small": "small", "fixed_large": "large"}


def schedule(name, description):
    """Betas, float64, of a fixture's description."""
    kind = description["kind"].split(" (")[0].replace(" ", "_").replace("improved_cosine", "cosine")
    start = description.get("beta_start", description.get("linear_start", 1e-4))
    end = description.get("beta_end", description.get("linear_end", 2e-2))
    return make_betas(
        kind, description["timesteps"], start, end, description.get("cosine_s", 0.008)
    )


def sample(family, run, config, noise_model, inputs):
    """The states, clean images and network times of one run."""
    steps, plan, sampler, options = PLANS[family](run, config.get("betas"))
    noises, seen = iter(inputs.get("noise", ())), []

    def noise():
        return next(noises, torch.zeros_like(inputs["x_T"]))

    x = sampler(
        guided(noise_model, run.get("guidance"), inputs),
        inputs["x_T"],
        steps,
        plan,
        noise=noise,
        callback=lambda *facts: seen.append(facts),
        **options,
    )
    t = torch.tensor([facts[1] for facts in seen], dtype=torch.float32)
    # its second call is no state
    path = [facts for facts in seen if sampler is not plms or facts[0] != 1]
    # ... but the better prediction
    clean = [facts[4] for facts in (seen[1:] if sampler is plms else seen)]
    return {
        "x": torch.stack([facts[2] for facts in path] + [x]),
        "pred_x0": torch.stack(clean),
        "x_final": x,
        "t": t,
    }


def guided(model, scale, inputs):
    """eps(x, t) of the conditional network, with classifier-free guidance where a scale is
    given."""
    if "context" not in inputs:
        return model
    if scale is None:
        return lambda x, t: model(x, t, inputs["context"])

    def eps(x, t):
        without = model(x, t, inputs["uncond"])
        return without + scale * (model(x, t, inputs["context"]) - without)

    return eps


def chain_of(betas, space, **changes):
    """The schedule of a file, with the rounding of the code that was recorded."""
    start, end = (
        betas.get(f"beta_{side}", betas.get(f"linear_{side}")) for side in ("start", "end")
    )
    return make_schedule(
        kind=betas["kind"],
        timesteps=betas["timesteps"],
        beta_start=start,
        beta_end=end,
        space=space,
        as_released=True,
        **changes,
    )


def pixel(run, betas):
    plan = chain_of(betas, "pixel")
    sampler, eta = (ddpm, 1.0) if run["kind"] == "ddpm_noisy" else (ddim, run["eta"])
    return step_sequence(run["skip"], run["steps"], plan), plan, sampler, {"eta": eta}


def latent(run, betas):
    kind = run["kind"]
    if kind == "ancestral":
        plan = chain_of({**betas, "timesteps": run["timesteps"]}, "latent")
        return step_sequence("respaced", run["timesteps"], plan), plan, ddpm, {}
    plan = chain_of(betas, "latent")
    if kind == "dpm_solver_pp_2m":
        return step_sequence("time_uniform", run["steps"], plan), plan, dpm_solver, {}
    sampler, options = (plms, {}) if kind == "plms" else (ddim, {"eta": run["eta"]})
    return step_sequence(run["skip"], run["steps"], plan), plan, sampler, options


def dpm_pixel(run, betas):
    plan = chain_of(betas, "pixel", rescale_timesteps=True)
    options = {
        "algorithm": run["algorithm"],
        "order": run["order"],
        "method": run["method"],
        "first_order_end": 10 if run["version"] == 2 else 15,
    }
    return step_sequence(run["skip"], run["steps"], plan), plan, dpm_solver, options


def respaced(run, _):
    kind = {"linear": "improved_linear"}.get(run["schedule"], run["schedule"])
    plan = make_schedule(
        kind=kind,
        timesteps=run["timesteps"],
        space="pixel64",
        as_released=True,
        clip=run["clip_denoised"],
        variance=VARIANCES[run["variance"]],
        rescale_timesteps=run["rescale_timesteps"],
    )
    respacing = run["respacing"] or str(run["timesteps"])
    if respacing.startswith("ddim"):
        steps = step_sequence("ddim", int(respacing[4:]), plan)
    else:
        steps = step_sequence(respacing, sum(map(int, respacing.split(","))), plan)
    return (
        (steps, plan, ddim, {"eta": run["eta"]})
        if run["kind"] == "ddim"
        else (steps, plan, ddpm, {})
    )


PLANS = {
    "sampler-pixel": pixel,
    "sampler-latent": latent,
    "sampler-dpm-pixel": dpm_pixel,
    "sampler-respaced": respaced,
}

"""Samplers retrace the recorded trajectories."""

import math

import fixture_adapter_samplers
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close, below, read_fixture

from base.seeds import SeededNoise
from ddim.sampler import SAMPLERS, ddim, ddpm, num_evaluations, plms
from ddim.schedule import make_schedule, step_sequence

FILES = {
    name: read_fixture(name)
    for name in ("sampler_pixel", "sampler_latent", "sampler_dpm_pixel", "sampler_respaced")
}
META, _, TENSORS = FILES["sampler_pixel"]


def recorded_network(meta, tensors):
    """The small fixed network with which the trajectories of a file were recorded: eps, then v if
    it has one."""
    w = below("model/", tensors)

    def network(x, t, context=None):
        phase = 2 * math.pi * t / 1000
        features = torch.stack([phase.sin(), phase.cos(), t / 1000], dim=1)
        h = F.conv2d(x, w["w1"], w["b1"], padding=1) + (features @ w["e"].T)[:, :, None, None]
        if context is not None:
            h = h + (context.flatten(1) @ w["u"].T)[:, :, None, None]
        out = F.conv2d(F.silu(h), w["w2"], w["b2"], padding=1)
        e, v = out[:, : x.shape[1]], out[:, x.shape[1] :]
        s = (t / 1000)[:, None, None, None]
        return torch.cat(
            [(meta["config"]["noise_model"]["k"] - s) * e + (math.pi / 2 * s).sin() * x, v], dim=1
        )

    return network


recorded_eps = recorded_network(META, TENSORS)


@pytest.mark.parametrize(
    "file, name", [(file, name) for file in FILES for name in FILES[file][0]["config"]["runs"]]
)
def test_every_recorded_run_as_released(file, name):
    meta, _, tensors = FILES[file]
    recorded = below(f"{name}/", tensors)
    inputs = {"x_T": recorded.get("x", recorded.get("x_calls"))[0]} | below("in/", tensors)
    inputs |= {key: recorded[key] for key in ("noise",) if key in recorded}
    found = fixture_adapter_samplers.sample(
        file.replace("_", "-"),
        meta["config"]["runs"][name],
        meta["config"],
        recorded_network(meta, tensors),
        inputs,
    )
    for key in {"x", "pred_x0"} & recorded.keys():  # per state
        for state, expected in zip(found[key], recorded[key], strict=True):
            assert_close(state, expected, meta["tolerance"])
    for key in {"x_final", "t"} & recorded.keys():
        assert_close(found[key], recorded[key], meta["tolerance"])


@pytest.mark.parametrize("name", META["config"]["runs"])
def test_recorded_trajectory(name):
    run, recorded = META["config"]["runs"][name], below(f"{name}/", TENSORS)
    sampler = {"ddim": ddim, "ddpm_noisy": ddpm}[run["kind"]]
    schedule = make_schedule(kind=META["config"]["betas"]["kind"])
    noises, seen = iter(recorded["noise"]), []
    x = sampler(
        recorded_eps,
        recorded["x"][0],
        step_sequence(run["skip"], run["steps"], schedule),
        schedule,
        noise=lambda: next(noises),
        eta=run.get("eta", 1.0),
        callback=lambda *facts: seen.append(facts),
    )
    assert [facts[0] for facts in seen] == list(range(len(recorded["t"])))
    assert [facts[1] for facts in seen] == recorded["t"].tolist()
    for state, expected in zip([facts[2] for facts in seen] + [x], recorded["x"], strict=True):
        assert_close(state, expected, META["tolerance"])
    for facts, expected in zip(seen, recorded["pred_x0"], strict=True):
        assert_close(facts[4], expected, META["tolerance"])


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms])
def test_exact_noise_leads_back_to_the_image(sampler):
    # For a single image x0 the best eps is known: (x - sqrt(a) x0) / sqrt(1 - a). Any sampler then
    # ends at x0.
    schedule, x0 = make_schedule(), torch.linspace(-0.9, 0.9, 12).view(1, 3, 2, 2)

    def eps(x, t):
        level = schedule.level(int(t[0]))
        return (x - level**0.5 * x0) / (1 - level) ** 0.5

    noise = SeededNoise(0, [0], x0.shape[1:])
    x = sampler(
        eps, noise.draw(), step_sequence("uniform", 20, schedule), schedule, noise=noise.draw
    )
    assert_close(x, x0, 1e-4)


def always(value):
    """A network that answers eps = 0.1 x and, if `value` is given, that v."""
    return lambda x, t: (
        0.1 * x if value is None else torch.cat([0.1 * x, torch.full_like(x, value)], dim=1)
    )


def test_learned_variance_runs_from_small_to_large():
    def run(variance, v):
        noise, schedule = SeededNoise(0, [0], (3, 2, 2)), make_schedule(variance=variance)
        return ddpm(
            always(v),
            noise.draw(),
            step_sequence("respaced", 10, schedule),
            schedule,
            noise=noise.draw,
        )

    assert_close(run("learned", 1.0), run("large", None), 1e-6)
    assert_close(run("learned", -1.0), run("small", None), 1e-6)
    # a variance that is not asked for is left
    assert torch.equal(run("small", 0.3), run("small", None))
    with pytest.raises(ValueError, match="the network answers eps alone; set schedule.variance"):
        run("learned", None)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("clip", [None, True, False])
def test_clip_bounds_the_predicted_image(sampler, clip):
    schedule, seen, noise = make_schedule(clip=clip), [], SeededNoise(0, [0], (3, 2, 2))
    SAMPLERS[sampler](
        always(None),
        30 * noise.draw(),
        step_sequence("uniform", 5, schedule),
        schedule,
        noise=noise.draw,
        callback=lambda *facts: seen.append(float(facts[4].abs().max())),
    )
    assert (max(seen) <= 1) == (clip is True or clip is None and sampler == "ddpm")


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 8])
def test_the_callback_tells_every_evaluation_and_its_time(name, num):
    schedule, asked, told = (
        make_schedule(kind="improved_linear", timesteps=4000, rescale_timesteps=True),
        [],
        [],
    )
    steps = step_sequence("time_uniform" if name.startswith("dpm_") else "ddim", num, schedule)
    noise = SeededNoise(0, [0], (3, 2, 2))

    def eps(x, t):
        asked.append((float(t[0]), x))
        return 0.1 * x

    x = SAMPLERS[name](
        eps,
        noise.draw(),
        steps,
        schedule,
        noise=noise.draw,
        callback=lambda *facts: told.append(facts),
    )
    assert [facts[0] for facts in told] == list(range(num_evaluations(name, steps)))
    assert [pytest.approx(facts[1]) for facts in told] == [t for t, _ in asked]
    assert all(0 <= t < 1000 for t, _ in asked)
    assert all(facts[2] is x for facts, (_, x) in zip(told, asked)) and torch.isfinite(x).all()


@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"ddim", "ddpm"}))
def test_deterministic_samplers_draw_nothing_and_refuse_an_eta(name):
    schedule = make_schedule()
    steps = step_sequence("time_uniform" if name.startswith("dpm_") else "uniform", 5, schedule)
    x = torch.ones(1, 3, 2, 2)
    SAMPLERS[name](always(0.5), x, steps, schedule, noise=None)
    with pytest.raises(ValueError, match="deterministic, but eta is 0.5; set eta to 0"):
        SAMPLERS[name](always(0.5), x, steps, schedule, noise=None, eta=0.5)


@pytest.mark.parametrize("sampler", [ddim, ddpm, plms])
def test_fractions_of_a_step_are_for_the_dpm_solvers(sampler):
    schedule = make_schedule()
    with pytest.raises(
        ValueError, match="step 999 may lie between two steps, which only the DPM-Solvers allow"
    ):
        sampler(
            always(None),
            torch.ones(1, 3, 2, 2),
            step_sequence("time_uniform", 10, schedule),
            schedule,
            noise=None,
        )


def test_repeated_steps_are_harmless():
    schedule = make_schedule()
    steps = step_sequence("quad", 100, schedule)
    assert steps[:5] == [0, 0, 0, 0, 1]
    for sampler in (ddim, ddpm, plms):
        noise = SeededNoise(0, [0], (3, 2, 2))
        x = sampler(
            lambda x, t: 0.1 * x,
            noise.draw(),
            steps,
            schedule,
            noise=noise.draw,
            eta=0.0 if sampler is plms else 1.0,
        )
        assert torch.isfinite(x).all()

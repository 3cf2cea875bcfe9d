"""Images that depend on seed and index alone, and the trajectories that lead to them."""

from dataclasses import replace

import pytest
import torch

from ddim.sampler import ddim
from ddim.schedule import step_sequence
from models.sampling import Sampling, denoise, sample, trajectory

FIVE = Sampling(steps=5, skip="uniform", seed=3, batch_size=7)


def test_sample_is_the_sampler_on_the_noise_of_the_images(tiny_model):
    steps = step_sequence("quad", 5, tiny_model.schedule)
    x = ddim(
        tiny_model.net,
        tiny_model.noise(3, [4, 5, 6, 7]).draw(),
        steps,
        tiny_model.schedule,
        noise=lambda: 0.0,
    )
    images = sample(tiny_model, [5, 7], replace(FIVE, skip="quad", batch_size=4))
    # the blocks are 4 .. 7 and no other
    assert torch.equal(images, tiny_model.decode(x)[[1, 3]])


@pytest.mark.parametrize("sampler, eta", [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 1.0)])
def test_an_image_has_the_same_bytes_whatever_is_drawn_with_it(tiny_model, sampler, eta):
    how = replace(FIVE, sampler=sampler, eta=eta)
    whole = sample(tiny_model, range(7, 14), how)
    for indices in ([7], [13], [9, 12], [12, 9], [9, 9], range(10, 14)):
        assert torch.equal(sample(tiny_model, indices, how), whole[[i - 7 for i in indices]])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, sample(tiny_model, range(7, 14), replace(how, seed=4)))


def test_images_of_several_blocks_are_those_of_each_block_alone(tiny_model):
    how, ran = replace(FIVE, batch_size=3, eta=1.0), []

    def eps(x, t, cond):
        ran.append(len(x))
        return tiny_model.net(x, t)

    whole = torch.cat([sample(tiny_model, range(k, k + 3), how) for k in (0, 3, 6)])
    assert torch.equal(sample(tiny_model, range(9), how), whole)
    # in the order asked for; the block in the middle does not run
    assert torch.equal(sample(tiny_model, [8, 0, 7, 2], how, eps=eps), whole[[8, 0, 7, 2]])
    assert ran == [3] * 10


def test_every_block_begins_where_start_says(tiny_model):
    """The last two of five steps, from an x of each block."""
    how, first = replace(FIVE, batch_size=2), torch.randn(4, *tiny_model.shape)
    images = sample(tiny_model, range(4), how, start=lambda batch: (first[batch], 2))
    for k in (0, 2):
        x = denoise(tiny_model, range(k, k + 2), how, start=lambda _: (first[k : k + 2], 2))
        assert torch.equal(images[k : k + 2], tiny_model.decode(x))
    steps = step_sequence("uniform", 5, tiny_model.schedule)[:2]
    x = ddim(tiny_model.net, first[:2], steps, tiny_model.schedule, noise=lambda: 0.0)
    assert torch.equal(images[:2], tiny_model.decode(x))


def test_batch_size_changes_at_most_one_grey_level(tiny_model):
    whole = sample(tiny_model, range(8), replace(FIVE, batch_size=8)).int()
    for size in (1, 2, 3, 5):
        parts = sample(tiny_model, range(8), replace(FIVE, batch_size=size)).int()
        assert (parts - whole).abs().max() <= 1


def test_callback_sees_every_step_and_cond_reaches_eps(tiny_model, monkeypatch):
    monkeypatch.setattr(
        tiny_model, "labels", lambda seed, indices: torch.tensor([seed + i for i in indices])
    )
    conds, steps = [], []

    def eps(x, t, cond):
        conds.append(cond.tolist())
        return tiny_model.net(x, t)

    sample(
        tiny_model,
        [2, 3],
        Sampling(steps=4, skip="uniform", seed=10, batch_size=2),
        eps=eps,
        callback=lambda step, t, *_: steps.append((step, t)),
    )
    assert steps == [(0, 750), (1, 500), (2, 250), (3, 0)] and conds == [[12, 13]] * 4


def test_nan_and_unknown_sampler_end_in_a_sentence(tiny_model):
    with pytest.raises(ValueError, match="NaN or infinite"):
        sample(tiny_model, [0], FIVE, eps=lambda x, t, cond: x * torch.nan)
    with pytest.raises(ValueError, match="'ddimm' is unknown; did you mean 'ddim'"):
        sample(tiny_model, [0], replace(FIVE, sampler="ddimm"))


def test_sampling_is_exact_and_leaves_the_users_flags(tiny_model, monkeypatch):
    cudnn, seen = torch.backends.cudnn, []
    monkeypatch.setattr(cudnn, "allow_tf32", True)
    monkeypatch.setattr(cudnn, "deterministic", False)

    def note(*_):
        seen.append((cudnn.allow_tf32, cudnn.deterministic))

    sample(tiny_model, [0], replace(FIVE, batch_size=1), callback=note)
    assert seen == [(False, True)] * 5 and cudnn.allow_tf32 and not cudnn.deterministic


def test_a_trajectory_holds_what_the_network_read_and_answered(tiny_model):
    rows = list(trajectory(tiny_model, replace(FIVE, batch_size=2), 3, seed=8))
    assert [(step, len(x)) for step, _, x, _, _ in rows] == [
        *((step, 2) for step in range(5)),
        *((step, 1) for step in range(5)),
    ]
    assert torch.equal(rows[0][2], tiny_model.noise(8, [0, 1]).draw())
    for _, t, x, cond, eps in rows:
        assert cond is None and torch.equal(eps, tiny_model.eps(x, torch.full((len(x),), float(t))))

"""Calibration sets: which steps of which images they hold, and files that are ours, foreign, broken
or hostile."""

import math
import re

import pytest
import torch
from tiny import SHAPE

from quant.calibration.builders import BUILDERS, check_builder
from quant.calibration.dataset import pick


def batches(num_steps, num=6, size=4):
    """Recorded trajectories: state s of image i has the value s + i / 10; steps 990, 989, ... were
    told."""
    values = torch.arange(num_steps + 1.0)[:, None] + torch.arange(-(-num // size) * size) / 10
    x = values[:, :, None, None, None].expand(*values.shape, *SHAPE)
    return list(x.split(size, dim=1)), 990 - torch.arange(num_steps)


def draw(name, num_steps, num_images, num_samples, seed=0, features=None, **options):
    rng = torch.Generator().manual_seed(seed)
    return BUILDERS[name](num_steps, num_images, num_samples, rng, features, **options)


@pytest.mark.parametrize(
    "total, asked, picked",
    [
        (10, 5, [0, 2, 4, 6, 8]),
        (10, 3, [0, 3, 6]),
        (10, 10, list(range(10))),
        (7, 5, [0, 1, 2, 4, 5]),
        (5, 1, [0]),
        (100, 20, list(range(0, 100, 5))),
    ],
)
def test_uniform_takes_every_so_many_steps_and_the_same_images(total, asked, picked):
    found = pick(*batches(total), draw("uniform", total, 5, 5 * asked), made={"builder": "uniform"})
    histogram = [5 * (step in picked) for step in range(total)]
    assert (
        found.made == {"builder": "uniform", "samples_per_step": histogram}
        and found.cond is found.which is None
    )
    assert found.t.dtype == torch.float32 and found.t.tolist() == [
        990.0 - i for i in picked for _ in range(5)
    ]
    expected = torch.tensor([i + image / 10 for i in picked for image in range(5)])
    torch.testing.assert_close(found.x, expected[:, None, None, None].expand(-1, *SHAPE))


@pytest.mark.parametrize(
    "total, asked, from_the_image",
    [
        (10, 4, [0, 1, 4, 9]),
        (17, 3, [0, 4, 16]),
        (5, 1, [0]),
        (7, 7, list(range(7))),
        (10, 6, [0, 1, 2, 3, 6, 9]),
        (50, 20, [0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 14, 16, 20, 23, 27, 31, 35, 39, 44, 49]),
    ],
)
def test_quad_is_denser_towards_the_image_and_takes_no_step_twice(total, asked, from_the_image):
    step, image = draw("quad", total, 3, 3 * asked)
    assert step.tolist() == [
        total - 1 - place for place in reversed(from_the_image) for _ in range(3)
    ]
    assert image.tolist() == [0, 1, 2] * asked


@pytest.mark.parametrize("name", ["uniform", "quad"])
@pytest.mark.parametrize("asked", [0, 11])
def test_impossible_number_of_steps(name, asked):
    with pytest.raises(
        ValueError, match=f"{asked} calibration steps asked for, the trajectory has 10"
    ):
        draw(name, 10, 4, 4 * asked)


def test_segments_of_the_multi_model_set():
    """100 steps in three segments, every second step, 128 images: 17, 17 and 17 steps."""
    found = [
        draw("segments", 100, 128, 17 * 128, first=a, last=b)
        for a, b in ((0, 0.33), (0.33, 0.66), (0.66, 1))
    ]
    assert [len(step) for step, _ in found] == [17 * 128] * 3
    assert [sorted(set(step.tolist())) for step, _ in found] == [
        list(range(a, b, 2)) for a, b in ((0, 33), (33, 66), (66, 100))
    ]
    assert all(image.tolist() == list(range(128)) * 17 for _, image in found)
    # 3 steps, room for 4 images at each
    step, image = draw("segments", 10, 8, 12, stride=4)
    assert step.tolist() == [0] * 4 + [4] * 4 + [8] * 4 and image.tolist() == [0, 1, 2, 3] * 3
    with pytest.raises(ValueError, match="has 0 of 10 steps for 12 samples"):
        draw("segments", 10, 8, 12, first=0.5, last=0.5)


@pytest.mark.parametrize("name", ["random", "linspace", "normal", "half_normal"])
def test_one_step_for_each_sample_and_the_images_in_turn(name):
    step, image = draw(name, 10, 6, 16)
    assert step.dtype == image.dtype == torch.int64 and image.tolist() == [i % 6 for i in range(16)]
    assert len(step) == 16 and step.min() >= 0 and step.max() <= 9
    again, other = draw(name, 10, 6, 16), draw(name, 10, 6, 16, seed=1)
    assert torch.equal(step, again[0]) and not torch.equal(step, other[0])


def test_linspace_is_the_rounded_grid():
    for num_steps, num in ((250, 1024), (10, 7), (5, 1), (1, 3)):
        j = [round(k * (num_steps - 1) / max(num - 1, 1)) for k in range(num)]
        assert sorted(draw("linspace", num_steps, 4, num)[0].tolist()) == sorted(
            num_steps - 1 - i for i in j
        )


def share_below(value):
    """Of the standard normal law."""
    return (1 + math.erf(value / math.sqrt(2))) / 2


def assert_masses(step, num_steps, mass):
    """mass(a, b) is the expected share of samples whose place from the image end lies in [a, b)."""
    found = (num_steps - 1 - step).bincount(minlength=num_steps) / len(step)
    expected = torch.tensor([mass(j, j + 1) for j in range(num_steps)])
    assert float(expected.sum()) == pytest.approx(1)
    assert (found - expected).abs().max() < 5 * (expected.max() / len(step)) ** 0.5


@pytest.mark.parametrize("mean, std", [(0.4, 0.4), (0.5, 0.35)])
@pytest.mark.parametrize("resample", [False, True])
def test_normal_steps_have_the_masses_of_the_normal_law(mean, std, resample):
    num_steps = 250
    step, _ = draw("normal", num_steps, 8, 100_000, mean=mean, std=std, resample=resample)

    def below(j):
        return share_below((j / num_steps - mean) / std)

    def mass(a, b):
        if resample:
            return (below(b) - below(a)) / (below(num_steps) - below(0))
        return (1 if b == num_steps else below(b)) - (0 if a == 0 else below(a))

    assert_masses(step, num_steps, mass)
    # what the released script's settings give
    if (mean, std, resample) == (0.4, 0.4, False):
        assert float((step == 249).float().mean()) == pytest.approx(0.161, abs=0.005)
        assert float((step == 0).float().mean()) == pytest.approx(0.068, abs=0.005)
        assert float((249.0 - step).mean()) / 250 == pytest.approx(0.419, abs=0.005)


def test_half_normal_steps_have_the_masses_of_the_folded_law():
    def mass(a, b):
        return 2 * ((1 if b == 50 else share_below(b / 50 / 0.4)) - share_below(a / 50 / 0.4))

    assert_masses(draw("half_normal", 50, 8, 100_000, std=0.4)[0], 50, mass)


def test_random_steps_are_equally_likely():
    assert_masses(draw("random", 20, 8, 100_000)[0], 20, lambda a, b: 1 / 20)


def test_legacy_pairing_shows_the_state_after_iteration_i_at_time_i():
    record, num = batches(10), 60
    step, image = draw("normal", 10, 6, num)
    i = 9 - step  # the number drawn
    right = pick(*record, (step, image), made={})
    wrong = pick(*record, draw("normal", 10, 6, num, pairing="legacy"), made={})
    assert right.t.tolist() == (990.0 - step).tolist() and wrong.t.tolist() == i.tolist()
    torch.testing.assert_close(right.x[:, 0, 0, 0], step + image / 10)
    torch.testing.assert_close(wrong.x[:, 0, 0, 0], i + 1 + image / 10)
    # the clean image in the end occurs
    assert i.max() == 9


@pytest.mark.parametrize("options", [{"std": 0.0}, {"pairing": "legcy"}])
def test_impossible_options_of_normal(options):
    with pytest.raises(ValueError, match="it takes a std above 0 and pairing correct or legacy"):
        draw("normal", 10, 6, 8, **options)


def test_conditions_go_with_their_images_and_guidance_doubles_the_set():
    cond, null, pairs = (
        torch.arange(6) * 10,
        torch.tensor([99]),
        (torch.tensor([3, 0, 3]), torch.tensor([5, 1, 0])),
    )
    own = pick(*batches(4), pairs, cond=cond, made={})
    assert own.arguments(slice(0, 3))[2].tolist() == [50, 10, 0] and own.made[
        "samples_per_step"
    ] == [1, 0, 0, 2]
    both = pick(*batches(4), pairs, cond=cond, null=null, made={})
    assert len(both) == 6 and torch.equal(both.x, torch.cat([own.x, own.x]))
    assert both.t.tolist() == [987.0, 990.0, 987.0] * 2
    assert both.arguments(slice(0, 6))[2].tolist() == [50, 10, 0, 99, 99, 99]
    assert own.trajectory.tolist() == [5, 1, 0] and both.trajectory.tolist() == [5, 1, 0, 11, 7, 6]


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("unifrom", {}, "calibration builder 'unifrom' is unknown; did you mean 'uniform'"),
        (
            "normal",
            {"maen": 0.4},
            "calibration builder 'normal' has no option 'maen'; did you mean 'mean'",
        ),
        (
            "uniform",
            {"mean": 0.4},
            "calibration builder 'uniform' has no option 'mean'; known: none",
        ),
        ("tdac", {"features": 3}, "has no option 'features'"),
    ],
)
def test_unknown_builders_and_options(name, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_builder(name, options)
    check_builder("normal", {"mean": 0.4, "std": 0.5, "resample": True, "pairing": "legacy"})

"""Calibration sets: which steps of which images they hold, and files that are ours, foreign, broken
or hostile."""

import math
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file
from tiny import SHAPE, normal, samples

from quant.calibration.builders import BUILDERS, check_builder
from quant.calibration.dataset import CalibrationSet, pick
from quant.calibration.files import load_calibration
from quant.timeline import Timeline


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


def test_subset_is_drawn_without_replacement_by_seed():
    whole = CalibrationSet(
        torch.arange(20.0)[:, None, None, None],
        torch.arange(20.0),
        torch.arange(20),
        torch.arange(20),
        made={"a": 1},
    )
    part, again, other = (whole.subset(8, Timeline(), seed) for seed in (0, 0, 1))
    assert len(part.t.unique()) == 8 and part.made == {"a": 1}
    assert torch.equal(part.x.flatten(), part.t) and torch.equal(
        part.arguments(slice(0, 8))[2], part.t.long()
    )
    assert torch.equal(part.t, again.t) and not torch.equal(part.t, other.t)
    assert sorted(whole.subset(50, Timeline(), 0).t.tolist()) == list(range(20))
    assert sorted(whole.subset(None, Timeline(), 0).t.tolist()) == list(range(20))


def test_a_subset_leaves_no_time_segment_empty():
    whole = CalibrationSet(torch.zeros(40, 1, 1, 1), torch.arange(40.0))
    tenths = Timeline([10.0, 20, 30, 39.5, 100])  # the last holds no sample at all
    few = whole.subset(2, tenths, 0)
    assert torch.equal(few.t[:2], whole.subset(2, Timeline(), 0).t)
    assert tenths.segments_of(few.t).unique().tolist() == [0, 1, 2, 3] and len(few) <= 5
    assert len(whole.subset(38, Timeline([20.0]), 0)) == 38


def test_stretches_are_all_successive_samples_of_a_trajectory():
    t = torch.tensor([5.0, 9, 1, 7, 3, 8, 2, 6])
    whole = CalibrationSet(
        torch.zeros(8, 1, 1, 1), t, trajectory=torch.tensor([0, 1, 0, 0, 2, 0, 1, 0])
    )
    assert t[whole.stretches(3)].tolist() == [[8, 7, 6], [7, 6, 5], [6, 5, 1]]
    assert t[whole.stretches(2)].tolist() == [[8, 7], [7, 6], [6, 5], [5, 1], [9, 2]]
    assert sorted(whole.stretches(1).tolist()) == [[i] for i in range(8)]
    part = whole.rows(torch.tensor([1, 6, 3]))
    assert part.t[part.stretches(2)].tolist() == [[9, 2]]
    assert torch.equal(whole.stretches(6), whole.stretches(5))  # the longest has 5
    with pytest.raises(ValueError, match="does not say on which trajectory"):
        CalibrationSet(whole.x, t).stretches(2)


def test_batches_are_in_order_and_complete():
    whole = samples(10)
    sizes, parts = [len(x) for x, _ in whole.batches(4)], list(zip(*whole.batches(4)))
    assert sizes == [4, 4, 2]
    assert torch.equal(torch.cat(parts[0]), whole.x) and torch.equal(torch.cat(parts[1]), whole.t)


@pytest.mark.parametrize("cond", [None, torch.arange(10)])
def test_file_round_trip_with_metadata(tmp_path, cond):
    whole, path = samples(10), tmp_path / "set.safetensors"
    whole.cond, whole.which = cond, None if cond is None else cond.flip(0)
    whole.made = {"builder": "uniform", "seeds": [1, 2], "note": None}
    whole.save(path)
    back = load_calibration(path)
    assert torch.equal(back.x, whole.x) and torch.equal(back.t, whole.t) and back.made == whole.made
    assert torch.equal(back.trajectory, whole.trajectory)
    assert (back.cond, back.which) == (None, None) if cond is None else torch.equal(back.cond, cond)
    for found, expected in zip(
        back.arguments(slice(2, 5)), whole.arguments(slice(2, 5)), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("steps_as", ["scalar", "one for each sample", "one element"])
def test_ecosystem_file(tmp_path, steps_as):
    """Q-Diffusion: xs and ts are lists over sampling steps."""
    xs = [normal(4, *SHAPE, seed=i) for i in range(3)]
    ts = {
        "scalar": [torch.tensor(900), torch.tensor(500), torch.tensor(1)],
        "one element": torch.tensor([900, 500, 1]),
        "one for each sample": [torch.full((4,), t) for t in (900, 500, 1)],
    }[steps_as]
    torch.save(
        {"xs": xs, "ts": ts, "cs": [torch.full((4, 2), i) for i in range(3)]}, tmp_path / "set.pt"
    )
    found = load_calibration(tmp_path / "set.pt")
    assert (
        torch.equal(found.x, torch.cat(xs))
        and found.t.tolist() == [900.0] * 4 + [500.0] * 4 + [1.0] * 4
    )
    assert found.cond[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.t.dtype == found.x.dtype == torch.float32
    assert found.trajectory.tolist() == [0, 1, 2, 3] * 3


def test_ecosystem_file_for_guidance_has_every_sample_twice(tmp_path):
    xs, cs, ucs = [normal(4, *SHAPE)], [torch.ones(4, 2)], [torch.zeros(4, 2)]
    torch.save({"xs": xs, "ts": [torch.tensor(7)], "cs": cs, "ucs": ucs}, tmp_path / "set.pt")
    found = load_calibration(tmp_path / "set.pt")
    x, t, cond = found.arguments(slice(None))
    assert (
        torch.equal(x, torch.cat(xs * 2))
        and t.tolist() == [7.0] * 8
        and cond[:, 0].tolist() == [1] * 4 + [0] * 4
    )
    assert found.trajectory.tolist() == list(range(8))
    torch.save({"xs": xs, "ts": [torch.tensor(7)], "ucs": ucs}, tmp_path / "set.pt")
    assert_refused(
        tmp_path / "set.pt", "4 conditions in 'ucs', which needs as many in 'cs'; found 0"
    )


class Malice:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("protocol", ["torch", "pickle"])
def test_hostile_file_is_refused_without_running(tmp_path, protocol):
    content = {"xs": [torch.ones(1)], "ts": [Malice(tmp_path / "touched")]}
    with open(tmp_path / "set.pt", "wb") as file:
        torch.save(content, file) if protocol == "torch" else pickle.dump(content, file, protocol=2)
    assert_refused(tmp_path / "set.pt", "not a readable torch file of plain tensors")
    assert not (tmp_path / "touched").exists()


def assert_refused(path, complaint):
    with pytest.raises(ValueError, match=complaint) as caught:
        load_calibration(path)
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("size", [0, 1, 20, 1000, -100])
def test_truncated_file_is_refused_in_one_sentence(tmp_path, suffix, size):
    path = tmp_path / f"set{suffix}"
    if suffix == ".pt":
        torch.save({"xs": [samples().x], "ts": [torch.tensor(3)]}, path)
    else:
        samples().save(path)
    path.write_bytes(path.read_bytes()[:size])
    assert_refused(path, "cut off" if suffix == ".safetensors" else "not a readable torch file")


@pytest.mark.parametrize(
    "content, complaint",
    [
        ([1, 2], "must hold a dict with 'xs' and 'ts'"),
        ({"xs": [torch.ones(1)]}, "must hold a dict with 'xs' and 'ts'"),
        (
            {"xs": [torch.ones(2, 3, 4, 4)], "ts": [torch.tensor(1), torch.tensor(2)]},
            "1 steps in 'xs' and 2 in 'ts'",
        ),
        ({"xs": [torch.ones(2, 3, 4, 4)], "ts": [torch.tensor([1, 2, 3])]}, "2 samples .* 3 steps"),
        ({"xs": [torch.ones(2, 3)], "ts": [1]}, r"in every entry of 'xs'; found \(2, 3\)"),
        ({"xs": [], "ts": []}, "in every entry of 'xs'; found no entry"),
        ({"xs": 3, "ts": [1]}, "a list over sampling steps in 'xs'"),
        (
            {"xs": [torch.ones(1, 3, 4, 4), torch.ones(1, 3, 8, 8)], "ts": [1, 2]},
            "a list over sampling steps in 'xs'",
        ),
        ({"xs": [torch.ones(1, 3, 4, 4)], "ts": ["late"]}, "a list over sampling steps in 'ts'"),
        (
            {"xs": [torch.ones(1, 3, 4, 4)], "ts": [1], "cs": [{"c": 1}]},
            "a list over sampling steps in 'cs'",
        ),
    ],
)
def test_torch_file_of_something_else(tmp_path, content, complaint):
    torch.save(content, tmp_path / "set.pt")
    assert_refused(tmp_path / "set.pt", complaint)


def test_foreign_safetensors_is_refused(tmp_path):
    save_file(
        {"x": torch.ones(2), "t": torch.ones(2)}, tmp_path / "set.safetensors", {"format": "pt"}
    )
    assert_refused(tmp_path / "set.safetensors", "is not a calibration file")


def test_missing_file_names_the_command_that_makes_it(tmp_path):
    assert_refused(tmp_path / "set.safetensors", "does not exist; scripts/calibrate.py makes it")


def test_thinned_is_an_even_pick():
    whole = CalibrationSet(torch.zeros(10, 1, 1, 1), torch.arange(10.0))
    assert whole.thinned(4).t.tolist() == [0, 3, 6, 9]
    assert whole.thinned(99).t.tolist() == list(range(10))

"""Calibration sets: which steps they hold, and files that are ours, foreign, broken or hostile."""
import pickle

import pytest
import torch
from safetensors.torch import save_file

from quant.calibration import BUILDERS, CalibrationSet, load_calibration, uniform
from tiny import SHAPE, normal, samples


def record(num_steps, num=6):
    """Step i shows images of value i + image / 10."""
    return [((i + torch.arange(num) / 10)[:, None, None, None].expand(num, *SHAPE), 990 - i) for i in range(num_steps)]


@pytest.mark.parametrize("total, asked, picked", [
    (10, 5, [0, 2, 4, 6, 8]), (10, 3, [0, 3, 6]), (10, 10, list(range(10))), (7, 5, [0, 1, 2, 4, 5]), (5, 1, [0]),
    (100, 20, list(range(0, 100, 5)))])
def test_uniform_takes_every_so_many_steps_and_the_same_images(total, asked, picked):
    found = uniform(record(total), asked, 4, {"builder": "uniform"})
    assert len(found) == 4 * asked and found.made == {"builder": "uniform"} and found.cond is None
    assert found.t.tolist() == [990.0 - i for i in picked for _ in range(4)]
    expected = torch.tensor([i + image / 10 for i in picked for image in range(4)])
    assert torch.equal(found.x, expected[:, None, None, None].expand(-1, *SHAPE))


def test_uniform_with_fewer_images_than_asked_for():
    found = BUILDERS["uniform"](record(4, num=3), 2, 8, {})
    assert len(found) == 6 and len(found.t) == 6


@pytest.mark.parametrize("asked", [0, 11])
def test_impossible_number_of_steps(asked):
    with pytest.raises(ValueError, match=f"{asked} calibration steps asked for, the sampler has 10"):
        uniform(record(10), asked, 4, {})


def test_subset_is_drawn_without_replacement_by_seed():
    whole = CalibrationSet(torch.arange(20.0)[:, None, None, None], torch.arange(20.0), torch.arange(20),
                           torch.arange(20), {"a": 1})
    part, again, other = whole.subset(8, 0), whole.subset(8, 0), whole.subset(8, 1)
    assert len(part.t.unique()) == 8 and part.made == {"a": 1}
    assert torch.equal(part.x.flatten(), part.t) and torch.equal(part.arguments(slice(0, 8))[2], part.t.long())
    assert torch.equal(part.t, again.t) and not torch.equal(part.t, other.t)
    assert sorted(whole.subset(50, 0).t.tolist()) == list(range(20))


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
    assert (back.cond, back.which) == (None, None) if cond is None else torch.equal(back.cond, cond)
    for found, expected in zip(back.arguments(slice(2, 5)), whole.arguments(slice(2, 5)), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("steps_as", ["scalar", "one for each sample", "one element"])
def test_ecosystem_file(tmp_path, steps_as):
    """Q-Diffusion: xs and ts are lists over sampling steps."""
    xs = [normal(4, *SHAPE, seed=i) for i in range(3)]
    ts = {"scalar": [torch.tensor(900), torch.tensor(500), torch.tensor(1)], "one element": torch.tensor([900, 500, 1]),
          "one for each sample": [torch.full((4,), t) for t in (900, 500, 1)]}[steps_as]
    torch.save({"xs": xs, "ts": ts, "cs": [torch.full((4, 2), i) for i in range(3)]}, tmp_path / "set.pt")
    found = load_calibration(tmp_path / "set.pt")
    assert torch.equal(found.x, torch.cat(xs)) and found.t.tolist() == [900.0] * 4 + [500.0] * 4 + [1.0] * 4
    assert found.cond[:, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert found.t.dtype == found.x.dtype == torch.float32


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


@pytest.mark.parametrize("content, complaint", [
    ([1, 2], "must hold a dict with 'xs' and 'ts'"),
    ({"xs": [torch.ones(1)]}, "must hold a dict with 'xs' and 'ts'"),
    ({"xs": [torch.ones(2, 3)], "ts": [torch.tensor(1), torch.tensor(2)]}, "1 steps in 'xs' and 2 in 'ts'"),
    ({"xs": [torch.ones(2, 3)], "ts": [torch.tensor([1, 2, 3])]}, "2 samples .* 3 steps"),
])
def test_torch_file_of_something_else(tmp_path, content, complaint):
    torch.save(content, tmp_path / "set.pt")
    assert_refused(tmp_path / "set.pt", complaint)


def test_foreign_safetensors_is_refused(tmp_path):
    save_file({"x": torch.ones(2), "t": torch.ones(2)}, tmp_path / "set.safetensors", {"format": "pt"})
    assert_refused(tmp_path / "set.safetensors", "is not a calibration file")


def test_missing_file_names_the_command_that_makes_it(tmp_path):
    assert_refused(tmp_path / "set.safetensors", "does not exist; scripts/calibrate.py makes it")

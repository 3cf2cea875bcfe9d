"""Files of calibration sets: ours, those of the ecosystem, and hostile ones."""

import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny import SHAPE, normal, samples

from quant.calibration.files import load_calibration


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

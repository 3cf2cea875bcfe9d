"""Checkpoints in every container load; a damaged or malicious one ends in a sentence and runs
nothing."""

import pickle

import pytest
import torch
from conftest import TINY
from safetensors.torch import save_file

from models.checkpoint_files import component, load_state
from models.weights import load_components
from models.zoo import build_network


def other(state):
    """What a data-parallel training run leaves beside its averaged weights."""
    return {f"module.{name}": value + 1 for name, value in state.items()}


CONTAINERS = {
    "flat": lambda state: state,
    "state_dict": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "pytorch-lightning_version": "2.0",
    },
    "training list": lambda state: [other(state), {"state": {}}, 12, 3400, state],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_containers(tiny_net, tmp_path, container, legacy):
    state = dict(tiny_net.state_dict())
    torch.save(
        CONTAINERS[container](state),
        tmp_path / "model.ckpt",
        _use_new_zipfile_serialization=not legacy,
    )
    loaded = load_state(tmp_path / "model.ckpt")
    assert list(loaded) == list(state) and all(
        torch.equal(loaded[name], state[name]) for name in state
    )


def test_the_weights_of_a_training_run_that_are_not_averaged(tiny_net, tmp_path):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS["training list"](state), tmp_path / "ckpt.pth")
    loaded = load_state(tmp_path / "ckpt.pth", ema=False)
    assert list(loaded) == list(state)  # the prefix "module." is gone
    assert torch.equal(loaded["conv_in.bias"], state["conv_in.bias"] + 1)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


WRITERS = {
    "zip": torch.save,
    "plain": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
    "legacy": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_code_in_a_checkpoint_never_runs(tmp_path, suffix, writer):
    trace, path = tmp_path / "trace", tmp_path / f"evil{suffix}"
    WRITERS[writer]({"state_dict": {"weight": torch.zeros(2)}, "extra": Payload(trace)}, path)
    expected = "damaged or incomplete" if writer == "plain" else "names .*, which runs code"
    with pytest.raises(ValueError, match=expected) as error:
        load_state(path)
    assert not trace.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.97])
def test_damaged_file(tiny_net, tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    save_file(tiny_net.state_dict(), path) if suffix == ".safetensors" else torch.save(
        tiny_net.state_dict(), path
    )
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="damaged or incomplete") as error:
        load_state(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"<!doctype html><html>not found</html>", b"\x80\x02K\x01.", bytes(range(256))]
)
def test_something_else_under_the_name_of_a_checkpoint(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or incomplete|no state dict"):
        load_state(tmp_path / "model.ckpt")


@pytest.mark.parametrize("content", [{}, [], {"epoch": 3}, [1, 2], torch.zeros(2)])
def test_a_pickle_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is no state dict"):
        load_state(tmp_path / "model.pt")


def test_absent_file_and_unknown_suffix(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_state(tmp_path / "model.ckpt")
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ValueError, match="ends in '.bin'; expected one of .ckpt"):
        load_state(tmp_path / "model.bin")


def test_a_training_list_gives_the_averaged_or_the_raw_set(tiny_net, tmp_path):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS["training list"](state), tmp_path / "ckpt.pth")
    for weights, offset in (("ema", 0), ("raw", 1)):
        net = build_network(**TINY)
        load_components(tmp_path / "ckpt.pth", {"unet": net}, weights=weights)
        assert torch.equal(net.conv_in.bias, state["conv_in.bias"] + offset)


def test_component_strips_its_prefix():
    assert component({"a.x": 1, "b.x": 2, "xa.x": 3}, "a.") == {"x": 1}

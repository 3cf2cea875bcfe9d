"""Checkpoints in every container load; a wrong, damaged or malicious one ends in a sentence and changes nothing."""
import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from conftest import TINY, randomize
from models.weights import load_state, load_weights, sha256_of, state_hash
from models.zoo import build_network


def other(state):
    """What a data-parallel training run leaves beside its averaged weights."""
    return {f"module.{name}": value + 1 for name, value in state.items()}


CONTAINERS = {
    "flat": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.0"},
    "training list": lambda state: [other(state), {"state": {}}, 12, 3400, state],
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_containers(tiny_net, tmp_path, container, legacy):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS[container](state), tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    loaded = load_state(tmp_path / "model.ckpt")
    assert list(loaded) == list(state) and all(torch.equal(loaded[name], state[name]) for name in state)


def test_the_weights_of_a_training_run_that_are_not_averaged(tiny_net, tmp_path):
    state = dict(tiny_net.state_dict())
    torch.save(CONTAINERS["training list"](state), tmp_path / "ckpt.pth")
    loaded = load_state(tmp_path / "ckpt.pth", ema=False)
    assert list(loaded) == list(state)                    # the prefix "module." is gone
    assert torch.equal(loaded["conv_in.bias"], state["conv_in.bias"] + 1)


def test_half_precision_file_is_cast_to_the_network(tiny_net, tmp_path):
    save_file({name: value.half() for name, value in tiny_net.state_dict().items()}, tmp_path / "half.safetensors")
    net = load_weights(build_network(**TINY), load_state(tmp_path / "half.safetensors"), "half")
    for name, value in tiny_net.state_dict().items():
        assert net.state_dict()[name].dtype == torch.float32
        assert torch.equal(net.state_dict()[name], value.half().float())


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


WRITERS = {"zip": torch.save, "plain": lambda x, path: path.write_bytes(pickle.dumps(x, protocol=2)),
           "legacy": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False)}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth"])
def test_code_in_a_checkpoint_never_runs(tmp_path, suffix, writer):
    trace, path = tmp_path / "trace", tmp_path / f"evil{suffix}"
    WRITERS[writer]({"state_dict": {"weight": torch.zeros(2)}, "extra": Payload(trace)}, path)
    with pytest.raises(ValueError, match="other than tensors") as error:
        load_state(path)
    assert not trace.exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
@pytest.mark.parametrize("kept", [0, 7, 0.3, 0.97])
def test_damaged_file(tiny_net, tmp_path, suffix, kept):
    path = tmp_path / f"model{suffix}"
    save_file(tiny_net.state_dict(), path) if suffix == ".safetensors" else torch.save(tiny_net.state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[:kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="damaged or incomplete") as error:
        load_state(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"<!doctype html><html>not found</html>", b"\x80\x02K\x01.", bytes(range(256))])
def test_something_else_under_the_name_of_a_checkpoint(tmp_path, content):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or incomplete|no state dict|other than tensors"):
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


FAULTS = {
    "misses 2 (conv_in.bias, norm_out.bias)": lambda s: [s.pop("conv_in.bias"), s.pop("norm_out.bias")],
    "has surplus 4 (a, b, c, ...)": lambda s: s.update({name: torch.zeros(1) for name in "abcd"}),
    "has misshapen 1 (conv_in.bias (9,) instead of (8,))": lambda s: s.update({"conv_in.bias": torch.zeros(9)}),
    "NaN or infinite weights in 1 (conv_in.bias)": lambda s: s.update({"conv_in.bias": torch.full((8,), torch.nan)}),
    "NaN or infinite weights in 1 (norm_out.bias)": lambda s: s.update({"norm_out.bias": torch.full((8,), -torch.inf)}),
}


@pytest.mark.parametrize("sentence", FAULTS)
def test_weights_that_do_not_fit_are_named_and_refused(tiny_net, sentence):
    state = dict(tiny_net.state_dict())
    FAULTS[sentence](state)
    net = build_network(**TINY)
    before = state_hash(net)
    with pytest.raises(ValueError) as error:
        load_weights(net, state, "checkpoint x")
    assert sentence in str(error.value) and "\n" not in str(error.value)
    assert state_hash(net) == before


def test_hashes(tiny_net, tmp_path):
    (tmp_path / "file").write_bytes(b"tiny" * 700_000)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(b"tiny" * 700_000).hexdigest()
    assert state_hash(tiny_net) == state_hash(randomize(build_network(**TINY)))
    first = state_hash(tiny_net)
    tiny_net.conv_in.bias.data[3] += 1e-7
    assert state_hash(tiny_net) != first

"""Whatever a pickled checkpoint holds beside its tensors, the tensors arrive and nothing else
happens."""

import argparse
import collections
import enum
import io
import os
import pickle
import sys
import tarfile
import types
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch

from models import pickles
from models.checkpoint_files import load_state

WEIGHTS = {"net.weight": torch.arange(6.0).view(2, 3), "net.bias": torch.ones(2)}


@pytest.fixture
def foreign(monkeypatch):
    """A training framework that is there when the file is written and absent when it is read."""
    module = types.ModuleType("some_framework")

    class Checkpointer:
        def __init__(self):
            self.best, self.history = torch.zeros(3), [1, 2]

        def __setstate__(self, state):
            raise AssertionError("code of the file ran")

    class Options(dict):
        pass

    class Rows(list):
        pass

    class Mode(enum.Enum):
        MIN = "min"

    for kind in (Checkpointer, Options, Rows, Mode):
        kind.__module__, kind.__qualname__ = "some_framework", kind.__name__
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, "some_framework", module)
    yield module
    assert "some_framework" not in sys.modules


def training_run(framework, state):
    """What a Lightning trainer leaves: callbacks by class object, options, counters, an optimizer
    of its own."""
    return {
        "epoch": 3,
        "global_step": np.int64(7),
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state,
        "callbacks": {
            framework.Checkpointer: {"best": torch.tensor(1.5), "mode": framework.Mode.MIN}
        },
        "optimizer_states": [framework.Checkpointer()],
        "rows": framework.Rows([1, 2]),
        "hyper_parameters": argparse.Namespace(
            lr=np.float64(1e-4),
            path=PurePosixPath("a/b"),
            kinds={"x", "y"},
            more=framework.Options(a=1),
            array=np.arange(3.0),
        ),
        "loops": collections.defaultdict(list, a=[1]),
        "counts": collections.Counter("aab"),
        "queue": collections.deque([1, 2]),
        "net": torch.nn.Linear(1, 1),
        "shape": torch.Size([1, 2]),
    }


# of PyTorch, about the source of `net` in the older format
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_run_gives_its_tensors(foreign, tmp_path, caplog, monkeypatch, legacy):
    path, state = tmp_path / "model.ckpt", collections.OrderedDict(WEIGHTS)
    state._metadata = {"": {"version": 1}}  # as state_dict() has it
    torch.save(training_run(foreign, state), path, _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "some_framework")
    caplog.set_level("INFO", "tinydm")
    loaded = load_state(path)
    assert list(loaded) == list(WEIGHTS) and all(
        torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS
    )
    (note,) = caplog.messages
    assert "skipped Python objects of " in note and "\n" not in note
    assert "some_framework.Checkpointer" in pickles.read(path)[1]


def test_members_of_enumerations_as_python_3_11_wrote_them_are_inert(tmp_path):
    """getattr(class, name): looked up nowhere, so it can neither run anything nor give anything."""
    torch.save({"w": torch.ones(2), "mode": Call(getattr, "text", "upper")}, tmp_path / "x.pt")
    content, skipped = pickles.read(tmp_path / "x.pt")
    assert torch.equal(content["w"], torch.ones(2)) and isinstance(content["mode"], pickles.Inert)
    assert [word.rpartition(".")[2] for word in skipped] == ["getattr"]


@pytest.mark.parametrize("mmap", [False, True])
def test_every_dtype_and_layout(tmp_path, mmap):
    base = torch.arange(24.0).view(4, 6)
    content = {
        "half": base.half(),
        "bf16": base.bfloat16(),
        "int8": base.to(torch.int8),
        "int64": base.long(),
        "bool": base > 3,
        "double": base.double(),
        "uint16": base.to(torch.uint16),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "whole": base,
        "parameter": torch.nn.Parameter(base),
        "expanded": torch.ones(1).expand(5),
    }
    torch.save(content, tmp_path / "x.pt")
    loaded, skipped = pickles.read(tmp_path / "x.pt", mmap=mmap)
    assert skipped == [] and list(loaded) == list(content)
    for name, value in content.items():
        assert loaded[name].dtype == value.dtype and loaded[name].stride() == value.stride()
        assert torch.equal(loaded[name], value)
    loaded["whole"][0, 0] = 99  # one storage in the file, one here
    assert loaded["transposed"][0, 0] == 99 and base[0, 0] == 0


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *arguments, state=None):
        self.parts = function, arguments, state

    def __reduce__(self):
        return self.parts if self.parts[2] is not None else self.parts[:2]


def attacks(trace):
    command = f"touch {trace}"
    code = f"open({str(trace)!r}, 'w').close()"
    return {
        "os.system": Call(os.system, command),
        "eval": Call(eval, code),
        "exec": Call(exec, code),
        "open": Call(open, str(trace), "w"),
        "import": Call(__import__, "os"),
        "nested": {
            "a": [({"b": Call(collections.OrderedDict, [("k", Call(os.system, command))])},)]
        },
        "as state": Call(collections.OrderedDict, state=Call(os.system, command)),
        "as key": {Call(os.getcwd): 1},
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", attacks("x"))
def test_code_is_refused_and_never_runs(tmp_path, name, legacy):
    trace, path = tmp_path / "trace", tmp_path / "model.ckpt"
    torch.save(
        {"state_dict": WEIGHTS, "extra": attacks(trace)[name]},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(ValueError, match="which runs code, so nothing was loaded or run") as error:
        load_state(path)
    assert not trace.exists() and "\n" not in str(error.value)


def raw(path, opcodes):
    """A file whose pickle is made of the given opcodes: the content is a dict with WEIGHTS under
    state_dict and what the opcodes leave on the stack under extra."""
    torch.save({"state_dict": WEIGHTS}, path)
    archive = torch._C.PyTorchFileReader(str(path))
    data = archive.get_record("data.pkl")
    assert data.endswith(b"s.") or data.endswith(b"u.")
    records = {
        name: archive.get_record(name)
        for name in archive.get_all_records()
        if name.startswith("data/")
    }
    writer = torch._C.PyTorchFileWriter(str(path))
    data = data[:-1] + b"X\x05\x00\x00\x00extra" + opcodes + b"s."
    writer.write_record("data.pkl", data, len(data))
    for name, record in records.items():
        writer.write_record(name, record, len(record))
    writer.write_end_of_file()


# none of these names is on the list of dangerous ones
RAW = {
    "a call of an unknown function": b"cunheard.of\nfunction\nX\x01\x00\x00\x00a\x85R",
    "its result called": b"cunheard.of\nfunction\n)R)R",
    "old instances": b"(X\x01\x00\x00\x00aiunheard.of\nKind\n",
    "attributes of a class": b"cunheard.of\nKind\n}X\x0c\x00\x00\x00dump_patches\x88sb",
    "slots of a class": b"cunheard.of\nKind\nN}X\x0c\x00\x00\x00dump_patches\x88s\x86b",
    "attributes of a function of PyTorch": (
        b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b"
    ),
    "a hub of models": b"ctorch.hub\nload\nX\x01\x00\x00\x00a\x85R",
    "a file within the file": b"ctorch.storage\n_load_from_bytes\nC\x03abc\x85R",
    "a name with a line of its own": b"\x8c\x02a\n\x8c\x02b\n\x93)R",
}


@pytest.mark.parametrize("name", RAW)
def test_unknown_names_are_inert(tmp_path, caplog, name):
    defaults = torch._utils._rebuild_tensor_v2.__defaults__
    raw(tmp_path / "model.ckpt", RAW[name])
    caplog.set_level("INFO", "tinydm")
    loaded = load_state(tmp_path / "model.ckpt")
    assert all(torch.equal(loaded[key], WEIGHTS[key]) for key in WEIGHTS)
    assert (
        torch._utils._rebuild_tensor_v2.__defaults__ == defaults and not pickles.Inert.dump_patches
    )
    assert len(caplog.messages) <= 1 and "\n" not in "".join(caplog.messages)


@pytest.mark.parametrize(
    "module, name",
    [
        ("os", "system"),
        ("posix", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "setattr"),
        ("__builtin__", "execfile"),
        ("os.path", "join"),
        ("builtins", "eval.x"),
    ],
)
def test_what_is_dangerous(module, name):
    assert pickles.dangerous(module, name)


@pytest.mark.parametrize(
    "module, name", [("builtins", "set"), ("osmosis", "system"), ("omegaconf", "DictConfig")]
)
def test_what_is_not(module, name):
    assert not pickles.dangerous(module, name)


@pytest.mark.filterwarnings("ignore")
def test_archives_of_other_kinds(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with tarfile.open(tmp_path / "tar.pt", "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())
    for name in ("script", "tar"):
        with pytest.raises(ValueError, match="a TorchScript or tar archive"):
            load_state(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_cut_file_with_more_than_tensors(tmp_path, legacy):
    path = tmp_path / "model.ckpt"
    run = {"state_dict": WEIGHTS, "options": argparse.Namespace()}
    torch.save(run, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for kept in (10, 100, len(content) // 2, len(content) - 20):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match="is damaged or incomplete"):
            load_state(path)


@pytest.mark.filterwarnings("ignore")
def test_a_plain_pickle_is_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_state(tmp_path / "model.pt")

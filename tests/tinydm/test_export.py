"""The stage that exports: words, what it writes and says, what it refuses."""

import json
import shutil

import pytest
import torch
from pipeline import NETWORK, WORDS, files, write_model

from models.zoo import build_network
from tinydm.stages import calibrate, export, quantize

pytest.importorskip("exported", reason="the extra export is not installed")


@pytest.fixture
def measured_once(monkeypatch):
    monkeypatch.setattr(export, "ROUNDS", 1)
    monkeypatch.setattr(export, "SECONDS", 0.1)


@pytest.fixture
def run(tmp_path):
    """A run folder of a model of few layers: an export takes its time for each."""
    network = NETWORK | {"image_size": 8, "ch_mult": [1], "attn_resolutions": []}
    facts = {"network": network, "schedule": {}, "sampling": {"skip": "uniform"}}
    torch.manual_seed(0)
    model = write_model(tmp_path, "few", facts, build_network(**network).state_dict())
    calibrate.run([*files(model, method="minmax"), *WORDS, f"out={tmp_path / 'run'}"])
    quantize.run([str(tmp_path / "run")])
    return tmp_path / "run"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["RUN", "to=onnx"], ["RUN", "to=onnx"]),
        (["RUN", "--to", "onnx", "--batch", "4"], ["RUN", "to=onnx", "batch=4"]),
        (["--to=openvino", "RUN"], ["to=openvino", "RUN"]),
    ],
)
def test_flags_are_words(arguments, words):
    assert export.flags_as_words(arguments) == words


def test_a_run_is_exported_and_held_to_the_definition(run, measured_once, capsys, monkeypatch):
    export.run([str(run), "--to", "onnx", "batch=2"])
    said, folder = capsys.readouterr().out, run / "onnx"
    facts = json.loads((folder / "export.json").read_text())
    assert facts["bytes"] == (folder / "network.onnx").stat().st_size
    found = facts["runtimes"]["onnxruntime"]
    assert found["difference"]["rms"] < 0.5 * facts["quantization error"]["rms"]
    assert found["times faster than"]["full precision"] > 0
    assert f"export: {folder / 'network.onnx'}" in said and "onnxruntime" in said

    pytest.importorskip("openvino", reason="openvino is not installed (extra export)")
    written = folder / "network.onnx"
    monkeypatch.setattr(export, "write_onnx", lambda path, *_: shutil.copy(written, path) and {})
    export.run([str(run), "to=openvino", "batch=2"])
    names = {path.name for path in (run / "openvino").iterdir()}
    assert names == {"network.xml", "network.bin", "export.json"}


def test_differences_are_in_units_of_the_answers_deviation():
    expected = torch.tensor([-2.0, 0.0, 2.0])  # deviation 2
    found = export.difference(expected + torch.tensor([0.0, 0.0, 1.0]), expected)
    assert found == {"largest": 0.5, "rms": pytest.approx(0.5 / 3**0.5)}


@pytest.mark.parametrize(
    "words, said",
    [
        (["to=onyx"], "to='onyx' is no format to export to; did you mean 'onnx'?"),
        ([], "to='' is no format to export to; known: onnx, openvino"),
        (["to=onnx", "batch=1"], "batch=1 is no number of samples to compare; give 2 or more"),
    ],
)
def test_what_cannot_be_exported_is_refused(words, said):
    with pytest.raises(ValueError) as error:
        export.run(["nowhere", *words])
    assert str(error.value) == said

"""What is measured: names, and a tiny network through each that can run anywhere."""

import pytest
import torch
import yaml
from conftest import TINY

from tinydm.benchmark import variants
from tinydm.benchmark.networks import Network
from tinydm.benchmark.variants import Case, forward_call, keys_of, sampling_call, title

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def case(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "network": TINY}))
    network = Network(str(path), CPU)
    return Case(network, network.arguments(2), 1)


def test_words_widths_and_devices():
    keys = keys_of(["w4a8", "w8a8"], CPU)
    assert keys[:3] == ["fp32", "channels_last", "bf16"]
    assert {"openvino", "openvino w4a8", "published w4a8", "integer w8a8"} < set(keys)
    assert not {"fp16", "published w8a8", "published", "openvino w8a8", "integer"} & set(keys)
    assert keys_of(["w8a8"], CPU, ["compiled"]) == ["fp32", "compiled w8a8"]
    on_gpu = keys_of(["w4a8"], CUDA)
    assert "fp16" in on_gpu and not [key for key in on_gpu if key.startswith(("onnx", "openv"))]
    assert set(variants.TITLES) == set(variants.MAKERS)
    assert title("integer w4a8") == "integer, eager glue W4A8"
    assert [title(key) for key in ("fp32", "openvino")] == ["fp32 eager NCHW", "OpenVINO fp32"]


@torch.no_grad()
def test_full_precision_and_simulated_variants_answer_alike(case):
    base = forward_call("fp32", case)()
    for key, least in (("channels_last", 100), ("published w8a8", 25), ("simulated w8a8", 25)):
        answer = forward_call(key, case)()
        assert 20 * torch.log10(base.norm() / (answer - base).norm()) > least, key


@torch.no_grad()
def test_bfloat16_where_it_is_emulated_is_refused(case, monkeypatch):
    monkeypatch.setattr(variants, "computes_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="emulates bfloat16"):
        forward_call("bf16", case)
    monkeypatch.setattr(variants, "computes_bfloat16", lambda device: True)
    assert forward_call("bf16", case)().shape == (2, 3, 8, 8)


@torch.no_grad()
def test_integers_answer_as_their_definition_and_are_made_once(case):
    """Up to ties: on integers maps lie in channels_last, and norms add up in that order."""
    simulated = forward_call("simulated w4a8", case)()
    for key in ("integer w4a8", "compiled w4a8", "integer w4a8"):
        answer = forward_call(key, case)()
        assert (answer - simulated).norm() < 0.02 * simulated.norm()
    assert len(case.network.made) == 3


@torch.no_grad()
def test_sampling_runs_visit_every_step(case):
    calls = []
    case.network.net.register_forward_hook(lambda *_: calls.append(1))
    image = sampling_call("fp32", case, 4)()
    assert len(calls) == 4 and image.shape == (2, 3, 8, 8)
    assert not torch.equal(sampling_call("simulated w8a8", case, 4)(), image)


@torch.no_grad()
def test_other_run_times_answer_alike_from_one_file(case, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    network, written = case.network, []

    def write_onnx(path, net, arguments):
        """The float network's file in place of the quantized one's: tests/quant/export has that."""
        written.append((net, len(arguments[0])))
        float_file = network.written("fp32-2", None)
        for part in float_file.parent.iterdir():
            path.with_name(part.name).write_bytes(part.read_bytes())

    monkeypatch.setattr(variants, "write_onnx", write_onnx)
    base = forward_call("fp32", case)()
    for bits in ("", " w8a8"):
        for runtime in ("onnxruntime", "openvino"):
            answer = forward_call(f"{runtime}{bits}", case)()
            assert (answer - base).norm() < 1e-5 * base.norm()
    assert written == [(network.quantized("w8a8"), 2)]


def test_a_run_time_that_is_not_there(case, monkeypatch):
    monkeypatch.setattr("quant.export.packages.is_here", lambda package: package != "openvino")
    with pytest.raises(ValueError, match="openvino is not installed; get what exports need with"):
        forward_call("openvino", case)

"""The files of an exported network: what lies in them, and who reads them."""

import pytest
import torch
from exported import LITTLE, little, traced
from tiny import normal, rules
from torch import nn

import quant
import quant.export.packages
from base.files import PROJECT
from quant.export.files import write_onnx, write_openvino
from quant.export.packages import needed
from quant.export.runtimes import OnnxRuntime, OpenVINO
from quant.network import harden, quant_layers
from quant.packing import unpack

X, T = normal(2, *LITTLE), torch.tensor([10.0, 900.0])


@pytest.fixture(scope="module")
def net():
    net = quant.convert(little(), rules(4, 8))
    with quant.observing(net):
        net(X, T)
    quant.fit(net)
    harden(net)
    return net


@pytest.fixture(scope="module")
def file(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("exported") / "net.onnx"
    write_onnx(path, net, (X, T))
    return path


def test_weights_of_four_bits_lie_in_the_file_as_such(net, file):
    import onnx

    onnx.checker.check_model(str(file))
    model = onnx.load(file)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    codes = {name: t for name, t in stored.items() if t.data_type == onnx.TensorProto.UINT4}
    layers = quant_layers(net)
    assert len(codes) == sum(len(layer.parts) for layer in layers.values())
    name = next(name for name in codes if name.startswith("net.stem."))
    low = onnx.numpy_helper.to_array(stored[name.removesuffix("codes") + "low"])
    packed = torch.frombuffer(bytearray(codes[name].raw_data), dtype=torch.uint8)
    found = unpack(packed, 4, tuple(codes[name].dims)).int() + torch.from_numpy(low.copy()).int()
    assert torch.equal(found.float(), layers["stem"].weight_int)
    assert str(PROJECT).encode() not in file.read_bytes()


def test_batches_may_have_any_size(file):
    session = OnnxRuntime(file, threads=1)
    both = session(X, T)
    alone = torch.cat([session(X[:1], T[:1]), session(X[1:], T[1:])])
    assert (both - alone).abs().max() < 0.2 * both.std()  # a float product rounds by its size


def test_openvino_multiplies_integers_and_reads_either_file(net, file, tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed (extra export)")
    write_openvino(tmp_path / "net.xml", file)
    answers = [OpenVINO(path, threads=1) for path in (file, tmp_path / "net.xml")]
    first, second = (session(X, T) for session in answers)
    assert torch.equal(first, second)
    assert (first - net(X, T)).std() < 0.05 * first.std()
    products = answers[1].products(X, T)
    layers = sum(len(layer.parts) for layer in quant_layers(net).values())
    assert sum(products["integer"].values()) == layers


class Twice(nn.Module):
    def forward(self, x, t):
        return x @ x.transpose(1, 2) + t.reshape(-1, 1, 1)


def test_products_of_onnx_runtime_are_counted(tmp_path):
    x = normal(2, 3, 4)
    (tmp_path / "twice.onnx").write_bytes(traced(Twice(), (x, T)).SerializeToString())
    counts = OnnxRuntime(tmp_path / "twice.onnx", threads=1).products(x, T)
    assert counts["integer"] == {} and sum(counts["float"].values()) == 1


def test_a_missing_package_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setattr(quant.export.packages, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx, openvino are not installed; .*tinydm\[export\]"):
        needed("onnx", "openvino")

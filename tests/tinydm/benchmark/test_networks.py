"""Networks of model YAMLs: random weights, arguments, widths, sizes."""

import pytest
import torch
import yaml
from conftest import TINY

from quant.network import quant_layers
from tinydm.benchmark.networks import Network

CPU = torch.device("cpu")


@pytest.fixture
def tiny_file(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", "network": TINY}))
    return str(path)


def test_weights_and_arguments_are_the_same_every_time(tiny_file):
    state = torch.get_rng_state()
    a, b = Network(tiny_file, CPU), Network(tiny_file, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    x, t = a.arguments(3)
    assert x.shape == (3, 3, 8, 8) and t.tolist() == [500.0] * 3
    assert torch.equal(a.net(x, t), b.net(*b.arguments(3))) and a.net(x, t).std() > 0.01
    assert a.model().shape == (3, 8, 8) and a.name == "tiny"


def test_conditions_of_a_class_network():
    network = Network("latent-compact-class", CPU)
    x, t, cond = network.arguments(2)
    assert network.net(x, t, cond).shape == x.shape


def test_widths_and_byte_range_of_weights(tiny_file):
    network = Network(tiny_file, CPU)
    for bits, wanted in (("w4a8", {4, 8}), ("w8a8", {8})):
        layers = quant_layers(network.quantized(bits))
        widths = {name: layer.weight_quantizer.spec.bits for name, layer in layers.items()}
        assert set(widths.values()) == wanted and widths["conv_in"] == widths["conv_out"] == 8
        for layer in layers.values():
            assert -128 <= layer.weight_int.min() and layer.weight_int.max() <= 127
    assert network.quantized("w4a8") is network.quantized("w4a8")


def test_sizes_of_files(tiny_file):
    network = Network(tiny_file, CPU)
    sizes = network.bytes()
    assert sizes["fp32"] == 4 * sum(p.numel() for p in network.net.parameters())
    assert sizes["fp32"] > 2 * sizes["W8"] > 2 * sizes["W4"]


def test_no_model_is_refused():
    with pytest.raises(ValueError, match="w4a8.yaml describes no network"):
        Network("configs/bits/w4a8.yaml", CPU)

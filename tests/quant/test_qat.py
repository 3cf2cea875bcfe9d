"""Quantization-aware training: what is learned and how, and what is exported."""

import copy

import pytest
import torch
from conftest import TINY, deviation
from tiny import SHAPE, normal, rules, samples

from models.zoo import build_network
from quant.checkpoint import load_quantized, save_quantized, stored_names
from quant.convert import convert
from quant.network import input_quantizers, quant_layers
from quant.qat import finish, prepare, scales_of

TIMES = [0.0, 250.0, 500.0, 990.0]
FLOAT = {"weight": {"bits": 32}, "input": {"bits": 32}}
RULES = [*rules(4, 4), *({"role": role} | FLOAT for role in ("stem", "out", "temb", "emb_proj"))]


def prepared(net, dynamic):
    """A converted network that is learned, with its functions moved away from where they start."""
    quantized = convert(net, RULES)
    torch.manual_seed(0)  # what the functions begin with
    prepare(quantized, samples(16), dynamic)
    quantizers = input_quantizers(quantized).items()
    functions = {name: q.soft_scale for name, q in quantizers if q.soft_scale is not None}
    for i, soft in enumerate(functions.values()):
        torch.nn.init.normal_(
            soft.layers[-1].weight, std=0.01, generator=torch.Generator().manual_seed(i)
        )
    return quantized, functions


def batch(num=4):
    return normal(num, *SHAPE, seed=5), torch.tensor(TIMES[:num])


def test_it_starts_at_the_fitted_ranges_static_or_dynamic(tiny_net):
    x, t = batch()
    static, _ = prepared(tiny_net, dynamic=False)
    dynamic = convert(tiny_net, RULES)
    prepare(dynamic, samples(16), dynamic=True)
    with torch.no_grad():
        # softplus(softplus^-1) moves a few codes
        assert deviation(dynamic(x, t), static(x, t)) < 0.05


def test_each_sample_has_the_scale_of_its_own_time(tiny_net):
    net, functions = prepared(tiny_net, dynamic=True)
    x, t = batch()
    whole = net(x, t)
    for i in range(len(x)):  # row by row
        assert torch.allclose(net(x[i : i + 1], t[i : i + 1])[0], whole[i], atol=1e-5)
    # and these differ
    assert all((soft.at(t)[0] != soft.at(t)[-1]).all() for soft in functions.values())


def test_everything_gets_a_gradient(tiny_net):
    for dynamic in (False, True):
        net, functions = prepared(tiny_net, dynamic)
        net(*batch()).square().mean().backward()
        learned = [p for soft in functions.values() for p in soft.parameters()] + scales_of(net)
        learned += [layer.weight for layer in quant_layers(net).values()]
        assert all(p.grad is not None and float(p.grad.abs().max()) > 0 for p in learned)
        inputs = input_quantizers(net)
        assert len(functions) == (len(inputs) if dynamic else 0)
        assert all(q.scale.requires_grad is not dynamic for q in inputs.values())


def test_gradients_of_weight_and_scale_are_those_of_lsq(tiny_net):
    layer = quant_layers(prepared(tiny_net, dynamic=False)[0])["down.0.block.0.conv1"]
    q, weight = layer.weight_quantizer, layer.weight
    q(weight).sum().backward()
    scale, zero_point = (v.detach().reshape(-1, 1, 1, 1) for v in (q.scale, q.zero_point))
    ratio = weight.detach() / scale
    code = ratio.round().clamp(-zero_point, 15 - zero_point)
    inside = (ratio >= -zero_point) & (ratio <= 15 - zero_point)
    expected = (
        torch.where(inside, code - ratio, code).sum((1, 2, 3)) / (weight[0].numel() * 15) ** 0.5
    )
    assert torch.allclose(q.scale.grad[0], expected, rtol=1e-3, atol=1e-5)
    assert torch.allclose(weight.grad, inside.float(), atol=1e-6)


def test_gradient_of_an_activation_scale_counts_the_values_of_a_sample(tiny_net):
    net, _ = prepared(tiny_net, dynamic=False)
    q = input_quantizers(net)["down.0.block.0.conv2.input_quantizer"]
    x = normal(3, 8, 8, 8)
    (q.codes(x) * q.table(q.scales(), x)).sum().backward()
    ratio, low = x / q.scale.detach(), -float(q.zero_point)
    code, inside = ratio.round().clamp(low, low + 15), (ratio >= low) & (ratio <= low + 15)
    expected = torch.where(inside, code - ratio, code).sum() / (512 * 15) ** 0.5
    assert float(q.scale.grad) == pytest.approx(float(expected), rel=1e-3)


def test_the_table_is_the_function_at_the_samplers_steps(tiny_net):
    net, functions = prepared(tiny_net, dynamic=True)
    done, stored = finish(net, reversed(TIMES))
    assert done.timeline.num_segments == len(TIMES)
    for name, q in input_quantizers(done).items():
        assert torch.equal(q.scale, functions[name].at(torch.tensor(TIMES)))
        assert q.soft_scale is None and not q.scale.requires_grad
    assert stored.keys() == {
        f"{name}|{key}" for name, soft in functions.items() for key, _ in soft.named_parameters()
    }


def test_functions_are_modules_of_the_network_and_no_part_of_its_file(tiny_net):
    """Who moves, copies, averages or counts the network has them too."""
    net, functions = prepared(tiny_net, dynamic=True)
    parameters = {id(p) for p in net.parameters()}
    assert all(id(p) in parameters for soft in functions.values() for p in soft.parameters())
    twin = copy.deepcopy(net)
    for name, q in input_quantizers(twin.double()).items():
        assert q.soft_scale is not functions[name]
        assert q.soft_scale.layers[0].weight.dtype == torch.float64
    assert not any("soft_scale" in name for name in stored_names(net))
    done, _ = finish(net, TIMES)
    assert not any("made_by" in name for name in stored_names(done))


def test_the_static_baseline_has_one_scale(tiny_net):
    net, functions = prepared(tiny_net, dynamic=False)
    done, stored = finish(net, TIMES)
    assert not functions and not stored and done.timeline.num_segments == 1
    assert all(len(q.scale) == 1 for q in input_quantizers(done).values())


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_file_answers_as_the_network_did_in_training(tiny_net, tmp_path, dynamic):
    net, _ = prepared(tiny_net, dynamic)
    x, t = batch()
    with torch.no_grad():
        expected = net(x, t)
    recipe = {"name": "tiny", "network": TINY, "rules": RULES, "weights_hash": ""}
    save_quantized(tmp_path / "q.safetensors", finish(net, TIMES)[0], recipe)
    loaded = load_quantized(tmp_path / "q.safetensors", build_network)
    assert deviation(loaded(x, t), expected) < 1e-4


def test_functions_of_time_need_quantized_activations(tiny_net):
    with pytest.raises(ValueError, match="set bits.input below 16"):
        prepare(convert(tiny_net, rules(4, 32)), samples(4), dynamic=True)

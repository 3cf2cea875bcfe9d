"""The net-level face, on a network of the user's own: plain layers without roles."""

import copy
import doctest
import inspect
import subprocess
import sys

import pytest
import torch
from conftest import deviation
from tiny import normal
from torch import nn

import quant
from base.files import PROJECT, load_tensors
from quant.network import input_quantizers, quant_layers

RULES = [{"weight": {"bits": 8, "per": "channel"}, "input": {"bits": 8}}]


class Net(nn.Module):
    """What anybody might write: no role, no block, nothing of ddim or ldm."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.time = nn.Linear(1, width)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.stem(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.out(torch.nn.functional.silu(h))


class Told(Net):
    """The same under a condition (N, 3)."""

    def forward(self, x, t, cond):
        return super().forward(x + cond[:, :, None, None], t)


def network(kind=Net, seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**options)


X, T = normal(8, 3, 8, 8), torch.linspace(999, 0, 8)
pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")


def quantized(net, rules=RULES, boundaries=(), arguments=(X, T)):
    qnet = quant.convert(net, rules, quant.Timeline(boundaries))
    with quant.observing(qnet):
        qnet(*arguments)
    quant.fit(qnet)
    return qnet


@pytest.mark.parametrize(
    "name", [n for n in quant.__all__ if inspect.isfunction(getattr(quant, n))]
)
def test_examples_run(name, tmp_path):
    found = doctest.DocTestFinder().find(getattr(quant, name), name)
    assert any(test.examples for test in found), f"{name} has no example"
    net, folder = network(width=4), tmp_path
    known = {"quant": quant, "torch": torch, "Net": lambda: network(width=4), "net": net}
    known |= {"x": X, "t": T, "rules": RULES, "qnet": quantized(net), "folder": folder}
    quant.save(known["qnet"], folder / "q.safetensors")
    for test in found:
        test.globs = known
        assert doctest.DocTestRunner().run(test).failed == 0


def test_a_network_of_plain_layers_is_quantized_saved_and_loaded(tmp_path):
    net = network()
    before = copy.deepcopy(net.state_dict())
    qnet = quantized(net)
    assert quant_layers(qnet).keys() == {"stem", "time", "out"}
    assert all(layer.role == "" for layer in quant_layers(qnet).values())
    soft = qnet(X, T)
    assert 0 < deviation(soft, net(X, T)) < 0.05
    quant.save(qnet, tmp_path / "q.safetensors")
    assert all(layer.weight is None for layer in quant_layers(qnet).values())  # hardened
    assert deviation(qnet(X, T), soft) < 1e-5
    other = network(seed=1)
    weights = copy.deepcopy(other.state_dict())
    again = quant.load(tmp_path / "q.safetensors", other)
    assert torch.equal(again(X, T), qnet(X, T))
    for own, old in ((net, before), (other, weights)):  # the float networks keep what they have
        assert all(torch.equal(value, old[name]) for name, value in own.state_dict().items())


def test_a_condition_is_handed_on_and_segments_have_own_scales(tmp_path):
    net, arguments = network(Told), (X, T, normal(8, 3, seed=2))
    qnet = quantized(net, boundaries=[500.0], arguments=arguments)
    assert all(len(q.scale) == 2 for q in input_quantizers(qnet).values())
    quant.save(qnet, tmp_path / "q.safetensors")
    again = quant.load(tmp_path / "q.safetensors", network(Told))
    assert again.timeline.num_segments == 2
    assert torch.equal(again(*arguments), qnet(*arguments))


def test_calls_and_blocks_of_observing_add_up():
    net = network()
    whole, parts = quantized(net), quant.convert(net, RULES)
    for half in (slice(0, 3), slice(3, 8)):
        with quant.observing(parts):
            answer = parts(X[half], T[half])
            assert torch.allclose(answer, net(X[half], T[half]), atol=1e-6)  # in full precision
    quant.fit(parts)
    for q, other in zip(input_quantizers(parts).values(), input_quantizers(whole).values()):
        assert torch.equal(q.scale, other.scale) and q.enabled


def test_an_error_while_observing_forgets_what_was_seen():
    qnet = quant.convert(network(), RULES)
    with pytest.raises(RuntimeError), quant.observing(qnet):
        qnet(X, T)
        qnet(X[:, :2], T)
    assert not qnet.observers and all(q.enabled for q in input_quantizers(qnet).values())


def test_weights_alone_need_no_samples():
    qnet = quant.convert(network(), [{"weight": {"bits": 4}}])
    quant.fit(qnet)
    assert torch.isfinite(qnet(X, T)).all()


def test_passes_of_a_method_run_on_it():
    net, samples = network(), quant.CalibrationSet(X, T)
    passes = ["fit_ranges", {"reconstruct": {"weight_iters": 3, "input_iters": 3}}]
    qnet, facts = quant.run_passes(quant.convert(net, RULES), passes, net, samples, seed=3)
    assert {fact["unit"] for fact in facts if "unit" in fact} == {"stem", "time", "out"}
    assert deviation(qnet(X, T), net(X, T)) < 0.05


@pytest.mark.parametrize(
    "passes, what",
    [
        (["step_bits", "fit_ranges"], "trajectories of the model"),
        (["fit_ranges", {"correct_noise": {"num_images": 2}}], "trajectories of the model"),
        (["fit_ranges", {"reconstruct": {"frequency": 1.0}}], "images with gradients"),
    ],
)
def test_a_pass_that_needs_more_than_a_network_says_so(passes, what):
    net, samples = network(), quant.CalibrationSet(X, T)
    with pytest.raises(ValueError, match=f"a pass in this list needs {what}, .* give .* model="):
        quant.run_passes(quant.convert(net, RULES), passes, net, samples)
    run = {"trajectory": lambda num_images, seed: iter([(0, 500.0, X, None, X)])}
    with pytest.raises(ValueError, match="a pass in this list needs the model's with_net, which"):
        passes = ["fit_ranges", "correct_noise"]
        quant.run_passes(quant.convert(net, RULES), passes, net, samples, **run)


def test_what_a_pass_decides_is_in_the_file(tmp_path):
    """decide_by_ranges says by rules which inputs have one scale for all segments."""
    net, samples = network(), quant.CalibrationSet(X, T)
    qnet = quant.convert(net, RULES, quant.Timeline([500.0]))
    qnet, _ = quant.run_passes(qnet, ["decide_by_ranges", "fit_ranges"], net, samples)
    assert {len(q.scale) for q in input_quantizers(qnet).values()} == {1, 2}
    quant.save(qnet, tmp_path / "q.safetensors")
    again = quant.load(tmp_path / "q.safetensors", network(seed=1))
    assert torch.equal(again(X, T), qnet(X, T))


def test_roles_do_not_speak_of_layers_without_one():
    qnet = quant.convert(network(), [*RULES, {"role": "stem", "weight": {"bits": 2}}])
    assert quant_layers(qnet)["stem"].weight_quantizer.spec.bits == 8


class Longer(Net):
    def __init__(self):
        super().__init__()
        self.more = nn.LayerNorm(3, bias=False)


def padded():
    return nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular")


def test_what_goes_wrong_gets_one_sentence(tmp_path):
    net, path = network(), tmp_path / "q.safetensors"
    with pytest.raises(ValueError, match="nothing was observed; run the network on samples"):
        quant.fit(quant.convert(net, RULES))
    with pytest.raises(ValueError, match="scales have not been fitted; call quant.fit"):
        quant.save(quant.convert(net, RULES), path)
    qnet = quantized(net)
    quant.save(qnet, path)
    with pytest.raises(ValueError, match="weights are integers already"), quant.observing(qnet):
        quant.fit(qnet)
    with pytest.raises(ValueError, match="does not fit this network .* first more.weight"):
        quant.load(path, Longer())
    with pytest.raises(
        ValueError, match=r"216 bytes, which does not fit \(3, 5, 3, 3\) .* load it"
    ):
        quant.load(path, Net(width=5))
    with pytest.raises(ValueError, match="padding_mode 'circular' cannot be quantized"):
        quant.convert(nn.Sequential(padded()), RULES)
    with pytest.raises(ValueError, match=r"load it with quant.load\(path, net\)"):
        quant.checkpoint.load_quantized(path, Net)
    assert load_tensors(path, only_metadata=True)[1]["recipe"] == {"rules": RULES}


def test_importing_it_loads_no_pass_and_nothing_heavy():
    code = "import quant, sys; print(*sys.modules)"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    heavy = {"scipy", "matplotlib", "PIL", "pytorch_lightning", "quant.passes", "models", "ddim"}
    assert not heavy & set(out.stdout.split())

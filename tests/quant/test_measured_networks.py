"""Ranges of the points of a network, and errors of its layers, planted or counted by hand."""

import math
from collections import defaultdict

import pytest
import torch
from tiny import SHAPE, make_job, normal, rules
from torch import nn

from base.network import Matmul
from quant.analysis import describe, layer_errors, observe_ranges
from quant.convert import convert
from quant.folds import scale_rows
from quant.layers import SWAP
from quant.passes.run import run_passes


@pytest.fixture(autouse=True)
def one_thread():
    """Sums of the same numbers, so that they are the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Attending(nn.Module):
    """Two heads in both layouts of ldm/attention.py; q, k, v (N, heads, D, L) come as they are."""

    def __init__(self):
        super().__init__()
        self.qk, self.av = Matmul("q", "k", num_heads=2), Matmul("v", "probs", num_heads=2)
        self.va = Matmul("probs", "v", num_heads=2)

    def forward(self, x, t):
        q, k, v = x
        probs = self.qk(q.transpose(2, 3), k).softmax(dim=-1)
        return self.av(v, probs.transpose(2, 3)), self.va(probs, v.transpose(2, 3))


class Lone(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t):
        return self.layer(x)


def signs(*shape):
    return normal(*shape).sign()


def test_features_of_heads_are_the_channels_of_q_k_and_v():
    q, k, v = (
        signs(3, 2, 4, 5) * (torch.arange(8.0) + first).reshape(2, 4, 1) for first in (1, 11, 21)
    )
    found = observe_ranges(Attending(), [(0, ((q, k, v), torch.zeros(3)))])
    assert list(found) == ["qk.q", "qk.k", "av.v", "av.probs", "va.probs", "va.v"]
    for point, first in (("qk.q", 1), ("qk.k", 11), ("av.v", 21), ("va.v", 21)):
        assert found[point].r_abs.tolist() == [[first + i for i in range(8)]], point
    probs = (q.transpose(2, 3) @ k).softmax(dim=-1)
    for point in ("av.probs", "va.probs"):
        assert (
            torch.equal(found[point].r_max[0], probs.amax(dim=(0, 2, 3)))
            and found[point].r_min.min() >= 0
        )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv2d(5, 2, 3), (4, 5, 6, 6)),
        (nn.Conv1d(5, 2, 1), (4, 5, 7)),
        (nn.Linear(5, 2), (4, 7, 5)),
        (nn.Linear(5, 2), (4, 5)),
    ],
)
def test_planted_gains_are_found(layer, shape):
    gain = torch.tensor([1.0, 1, 10, 1, 1])
    gain = gain if isinstance(layer, nn.Linear) else gain.reshape(5, *[1] * (len(shape) - 2))
    # steps in any order
    time_gain = {3: 4.0, 0: 1.0, 1: 2.0}
    found = observe_ranges(
        Lone(layer),
        [(step, (g * gain * signs(*shape), torch.zeros(4))) for step, g in time_gain.items()],
    )["layer"]
    assert found.r_abs.tolist() == [[g * c for c in (1, 1, 10, 1, 1)] for g in (1, 2, 4)]
    facts = describe(found.r_abs)
    assert facts["channel_imbalance"] == pytest.approx(10) and facts["rho"] < 1e-6
    assert facts["temporal_variation"] == pytest.approx(math.log(2) * (2 / 3) ** 0.5)


def stored(net, batches):
    """What every layer and product reads, whole -> {point: {step: [x]}}."""
    kept = defaultdict(lambda: defaultdict(list))
    for step, arguments in batches:
        handles = []
        for name, module in net.named_modules():
            if type(module) in SWAP:

                def keep(module, inputs, name=name):
                    roles = (
                        [f".{role}" for role in module.roles]
                        if isinstance(module, Matmul)
                        else [""]
                    )
                    for role, x in zip(roles, inputs):
                        kept[name + role][step].append(x)

                handles.append(module.register_forward_pre_hook(keep))
        with torch.no_grad():
            net(*arguments)
        for handle in handles:
            handle.remove()
    return kept


def trajectory():
    """Six batches at three steps, interleaved, of different sizes and offsets."""
    return [
        (
            step,
            (
                normal(num, *SHAPE, seed=10 * step + num) + 3 * step,
                torch.full((num,), 900.0 - 400 * step),
            ),
        )
        for num in (2, 5)
        for step in (1, 0, 2)
    ]


def test_streaming_equals_a_loop_over_stored_activations(tiny_net):
    found, whole = observe_ranges(tiny_net, iter(trajectory())), stored(tiny_net, trajectory())
    assert (
        list(found) == list(whole) and "conv_in" in found and "mid.attn_1.av_matmul.probs" in found
    )
    linear = {name for name, module in tiny_net.named_modules() if isinstance(module, nn.Linear)}
    # axes of (N, L, D), (N, D, L), (N, D, L)
    features = {"q": 2, "k": 1, "v": 1}
    for point, steps in whole.items():
        role = point.rpartition(".")[2] if "matmul" in point else None
        for step, parts in steps.items():
            x = torch.cat(parts)
            axis = features.get(role, x.dim() - 1 if point in linear else 1)
            rows = x.reshape(1, -1) if role == "probs" else x.movedim(axis, 0).flatten(1)
            ranges = found[point]
            assert ranges.r_min.shape == (3, len(rows)), point
            assert torch.equal(ranges.r_min[step], rows.amin(1)) and torch.equal(
                ranges.r_max[step], rows.amax(1)
            )
            assert torch.equal(ranges.r_abs[step], rows.abs().amax(1))
            torch.testing.assert_close(
                ranges.mean[step], rows.double().mean(1).float(), rtol=1e-5, atol=1e-6
            )
            torch.testing.assert_close(
                ranges.std[step], rows.double().std(1, correction=0).float(), rtol=1e-4, atol=1e-6
            )


def test_network_is_left_as_it_was_after_an_exception(tiny_net):
    def batches():
        yield trajectory()[0]
        raise KeyError("over")

    for measure in (
        lambda: observe_ranges(tiny_net, batches()),
        lambda: layer_errors(tiny_net, convert(tiny_net, rules(32, 32)), batches()),
    ):
        with pytest.raises(KeyError, match="over"):
            measure()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny_net.modules())


def test_32_bits_have_no_error_at_all(tiny_net):
    rows = layer_errors(tiny_net, convert(tiny_net, rules(32, 32)), trajectory())
    layers = [name for name, module in tiny_net.named_modules() if type(module) in SWAP]
    assert sorted({row["layer"] for row in rows}) == sorted(layers) and len(rows) == 3 * len(layers)
    assert all(row["mse"] == row["mae"] == 0 and row["sqnr_db"] > 200 for row in rows)
    assert [(row["step"], row["t"]) for row in rows[:3]] == [(0, 900), (1, 500), (2, 100)]


def test_planted_error_stays_in_its_layer(tiny_net):
    twin = convert(tiny_net, rules(32, 32))
    twin.net.conv_in.bias = nn.Parameter(tiny_net.conv_in.bias + 0.5)
    rows = layer_errors(tiny_net, twin, trajectory())
    assert {row["layer"] for row in rows if row["mse"]} == {"conv_in"}
    for row in (row for row in rows if row["layer"] == "conv_in"):
        assert row["mse"] == pytest.approx(0.25, rel=1e-5) and row["mae"] == pytest.approx(
            0.5, rel=1e-5
        )
        with torch.no_grad():
            out = torch.cat(
                [
                    tiny_net.conv_in(arguments[0])
                    for step, arguments in trajectory()
                    if step == row["step"]
                ]
            )
        power = float(out.double().square().mean())
        assert row["sqnr_db"] == pytest.approx(10 * math.log10(power / 0.25), abs=1e-3)


def test_error_is_that_of_the_segment_of_the_step(tiny_net, tmp_path):
    """A network with own scales for early and late steps, each layer by hand on the full-precision
    input."""
    job = make_job(tiny_net, tmp_path, rules(8, 4), boundaries=[450.0])
    run_passes(job, [{"fit_ranges": {}}])
    inputs = stored(tiny_net, trajectory())["conv_in"]
    for row in layer_errors(tiny_net, job.net, trajectory()):
        if row["layer"] == "conv_in":
            x = torch.cat(inputs[row["step"]])
            job.net.timeline.segment = int(row["t"] >= 450)
            with torch.no_grad():
                error = job.net.net.conv_in(x) - tiny_net.conv_in(x)
            assert row["mse"] == pytest.approx(float(error.square().mean()), rel=1e-4)
            assert row["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-4)


def test_a_fold_inside_attention_is_no_error(tiny_net, tmp_path):
    """q divided and k multiplied by 4: alone q would be at 2.5 dB, the block is what it was."""
    job = make_job(tiny_net, tmp_path, [rules(8, 8)[0] | {"balance": True}])
    for name, factor in (("q", 0.25), ("k", 4.0)):
        scale_rows(
            job.net.get_submodule(f"mid.attn_1.{name}"), torch.arange(16), torch.full((16,), factor)
        )
    run_passes(job, [{"fit_ranges": {}}])
    seen = [
        (step, job.calibration.arguments(slice(step, step + 1)))
        for step in range(len(job.calibration))
    ]
    rows = layer_errors(tiny_net, job.net, seen)
    own = [row for row in rows if row["layer"].startswith("mid.attn_1")]
    assert {row["layer"] for row in own} == {"mid.attn_1"} and len(own) == len(seen)
    assert all(25 < row["sqnr_db"] < 70 for row in own)

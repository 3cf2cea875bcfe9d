"""Ranges, what follows from them, and errors of layers and of eps, where the answer is planted or
counted by hand."""

import math
from collections import defaultdict

import pytest
import torch
from tiny import SHAPE, make_job, normal, rules
from torch import nn

from base.network import Matmul
from quant.analysis import (
    channel_imbalance,
    decide,
    describe,
    layer_errors,
    observe_ranges,
    range_model,
    step_sqnr,
    temporal_variation,
)
from quant.convert import convert
from quant.layers import SWAP
from quant.passes.balance import scale_rows
from quant.passes.run import run_passes

torch.set_num_threads(1)
RECORD = [
    (0, 900, normal(4, 3, 2, 2), "cond", normal(4, 3, 2, 2, seed=1)),
    (1, 100, normal(4, 3, 2, 2, seed=2), "cond", normal(4, 3, 2, 2, seed=3)),
]


def test_relative_error_in_decibels():
    exact = {float(t): eps for _, t, _, _, eps in RECORD}
    share = {900.0: 0.1, 100.0: 0.01}
    rows = step_sqnr(RECORD, lambda x, t, cond: exact[float(t[0])] * (1 + share[float(t[0])]))
    assert [(row["step"], row["t"]) for row in rows] == [(0, 900), (1, 100)]
    assert [row["sqnr_db"] for row in rows] == pytest.approx([20, 40], abs=1e-3)


def test_network_sees_the_recorded_x_and_a_step_for_each_image():
    def network(x, t, cond):
        expected = next(row for row in RECORD if row[1] == float(t[0]))
        assert (
            torch.equal(x, expected[2]) and t.shape == (4,) and (t == t[0]).all() and cond == "cond"
        )
        return torch.zeros_like(x)

    assert [row["sqnr_db"] for row in step_sqnr(RECORD, network)] == pytest.approx([0, 0], abs=1e-6)


def test_batches_of_a_step_add_up_and_a_learned_variance_does_not_count():
    whole = step_sqnr(RECORD, lambda x, t, cond: x)
    halves = [
        (step, t, x[rows], cond, torch.cat([eps[rows], 1e6 * eps[rows]], dim=1))
        for rows in (slice(0, 1), slice(1, 4))
        for step, t, x, cond, eps in RECORD
    ]
    found = step_sqnr(halves, lambda x, t, cond: torch.cat([x, 7 * x], dim=1))
    assert [(row["step"], row["t"]) for row in found] == [(0, 900), (1, 100)]
    assert [row["sqnr_db"] for row in found] == pytest.approx([row["sqnr_db"] for row in whole])


def test_no_error_is_a_large_number():
    rows = step_sqnr(RECORD[:1], lambda x, t, cond: RECORD[0][4])
    power = RECORD[0][4].double().square().sum().log10()
    assert rows[0]["sqnr_db"] == pytest.approx(10 * (float(power) + 30))


# ---- the model of ranges


def centred(num, seed):
    values = normal(num, seed=seed).double()
    return values - values.mean()


def test_rank_one_table_is_recovered():
    a, b = centred(12, 0), centred(7, 1)
    model = range_model((0.3 + a[:, None] + b).exp())
    torch.testing.assert_close(model["a"], a)
    torch.testing.assert_close(model["b"], b)
    assert model["mu"] == pytest.approx(0.3) and model["rho"] < 1e-6


def test_pure_interaction_has_no_scales_to_recover():
    a, b = centred(12, 0), centred(7, 1)
    model = range_model((a[:, None] * b).exp())
    assert (
        model["rho"] == pytest.approx(1)
        and model["a"].abs().max() < 1e-12
        and model["b"].abs().max() < 1e-12
    )


def test_residual_share_is_that_of_a_loop():
    r = normal(5, 4).abs().double() + 0.1
    log = [[math.log(float(v)) for v in row] for row in r]
    mu = sum(map(sum, log)) / 20
    rows, columns = [sum(row) / 4 for row in log], [sum(column) / 5 for column in zip(*log)]
    left = sum((log[t][c] - rows[t] - columns[c] + mu) ** 2 for t in range(5) for c in range(4))
    assert range_model(r)["rho"] == pytest.approx(
        left / sum((v - mu) ** 2 for row in log for v in row)
    )


def test_constant_table_asks_for_nothing():
    facts = describe(torch.full((9, 5), 0.37))
    assert facts == {
        "temporal_variation": pytest.approx(0, abs=1e-12),
        "channel_imbalance": 1.0,
        "rho": 0.0,
    }
    assert decide(facts) == {"segments": False, "balance": False, "by_range": False}


def test_dead_channels_count_for_nothing():
    a, b = centred(6, 0), centred(4, 1)
    alive = (a[:, None] + b).exp()
    # dying: dead at one step
    dead, dying = torch.zeros(6, 2), torch.cat([torch.zeros(1, 1), torch.ones(5, 1)])
    model = range_model(torch.cat([dead, alive, dying], dim=1))
    torch.testing.assert_close(model["b"][2:6], b)
    assert model["b"].isnan().tolist() == [True] * 2 + [False] * 4 + [True] and model["rho"] < 1e-6
    assert channel_imbalance(torch.cat([dead, alive], dim=1)) == channel_imbalance(alive)
    assert all(
        math.isnan(describe(dead)[key]) for key in ("temporal_variation", "channel_imbalance")
    )


def test_time_gain_and_channel_gain_are_told_apart():
    time_gain = torch.tensor([-0.5, 0.5, -0.5, 0.5]).exp()
    channel_gain = torch.tensor([1.0, 1, 1, 1, 10])
    facts = describe(time_gain[:, None].expand(4, 5))
    assert facts["temporal_variation"] == pytest.approx(0.5) and facts[
        "channel_imbalance"
    ] == pytest.approx(1)
    assert decide(facts) == {"segments": True, "balance": False, "by_range": False}
    facts = describe(channel_gain.expand(4, 5))
    assert facts["temporal_variation"] == pytest.approx(0) and facts[
        "channel_imbalance"
    ] == pytest.approx(10)
    assert decide(facts) == {"segments": False, "balance": True, "by_range": False}
    # the channel grows with time
    late = torch.where(torch.arange(4)[:, None] > 1, channel_gain, torch.ones(5))
    facts = describe(late)
    assert facts["temporal_variation"] == pytest.approx(math.log(10) / 10)
    assert decide(facts) == {"segments": False, "balance": True, "by_range": True}


def test_thresholds_are_the_callers():
    facts = {"temporal_variation": 0.3, "channel_imbalance": 5.0, "rho": 0.4}
    assert decide(facts) == {"segments": True, "balance": True, "by_range": True}
    assert decide(facts, segments_above=0.3, balance_above=5, by_range_above=0.4) == {
        "segments": False,
        "balance": False,
        "by_range": False,
    }


# ---- observation


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


# ---- errors of layers


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


def test_variation_of_a_scale():
    assert temporal_variation(torch.tensor([0.0, 2, 0, 2])) == 1

"""Temporal dynamic quantization: what the MLP gives, and that the table is all that runs."""

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_close
from tiny import SHAPE, make_job, normal, rules

from quant.layers import QuantLayer, QuantMatmul
from quant.network import input_quantizers, quant_layers
from quant.observer import fit_scales
from quant.passes.dynamic_scales import (
    DynamicScale,
    dynamic_scales,
    functions_of,
    retabulated,
    retimed,
)
from quant.passes.run import run_passes
from quant.quantizer import Quantizer
from quant.spec import QuantSpec
from quant.timeline import Timeline

TIMES = torch.tensor([0.0, 250, 500, 999])


def test_it_starts_at_the_given_scale_for_every_time():
    start = torch.tensor([0.02, 3.0])
    assert torch.allclose(DynamicScale(TIMES, start)(), start.expand(4, 2), rtol=1e-5)


def test_the_mlp_is_the_formula():
    soft = DynamicScale(TIMES, torch.tensor([0.1]), hidden=5, depth=3)
    torch.nn.init.normal_(soft.layers[-1].weight)
    t = 250.0
    half = [10000 ** (-k / 64) for k in range(64)]
    h = torch.tensor(
        [torch.cos(torch.tensor(t * f)) for f in half]
        + [torch.sin(torch.tensor(t * f)) for f in half]
    )
    for layer in list(soft.layers)[:-1]:
        h = F.relu(layer.weight @ h + layer.bias)
    expected = F.softplus(soft.layers[-1].weight @ h + soft.layers[-1].bias)
    assert torch.allclose(soft()[1], expected, rtol=1e-3)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_every_code_is_used_and_none_beyond(bits, symmetric):
    """Data that span the fitted range take all 2^b codes (2^b - 1 about zero); 4 bits are not 13
    codes."""
    torch.manual_seed(0)
    q = Quantizer(
        QuantSpec(bits=bits, symmetric=symmetric), torch.tensor(0), Timeline([125, 375, 750])
    )
    x = torch.linspace(-2, 2, 4096) if symmetric else torch.linspace(-1, 2, 4096)
    for s in range(4):
        fit_scales(q, [x[None]], s)
    q.soft_scale = soft = DynamicScale(TIMES, q.scale[0])
    top = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    for s in range(4):
        q.timeline.segment = s
        z = q.zero_point[s]
        assert torch.equal(
            (q.codes(x) + z).unique(), torch.arange(-top if symmetric else 0, top + 1).float()
        )
        # any scale: never more than b bits hold
        torch.nn.init.normal_(soft.layers[-1].weight, std=0.01)
        codes = (q.codes(100 * x) + z).detach()
        assert (float(codes.min()), float(codes.max())) == (-top - 1 if symmetric else 0, top)
        torch.nn.init.zeros_(soft.layers[-1].weight)


def test_warm_start_follows_the_fitted_table_and_hardens_to_it(tiny_net, tmp_path):
    some = [rule | {"match": "mid.*"} for rule in rules(32, 6)]  # each takes its time
    job = make_job(tiny_net, tmp_path, some, num=12, boundaries=[300, 700])
    run_passes(job, ["fit_ranges"])
    tables = {name: q.scale.clone() for name, q in input_quantizers(job.net).items()}
    facts = dynamic_scales(job, warm_steps=150)
    assert facts[0]["inputs"] == len(tables) and facts[0]["mean_log_deviation"] < 0.05
    x, t = normal(3, *SHAPE), torch.tensor([100.0, 500, 900])
    soft = job.net(x, t).detach()
    run_passes(job, [])  # hardens
    assert torch.equal(job.net(x, t), soft)  # the table is the MLP
    for name, q in input_quantizers(job.net).items():
        assert q.soft_scale is None and q.learned_by()
        assert torch.allclose(q.scale.log(), tables[name].log(), atol=0.3)


def test_a_batch_of_mixed_times_equals_single_samples(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(32, 6), num=12, boundaries=[300, 700])
    run_passes(job, ["fit_ranges", {"dynamic_scales": {"warm_steps": 20}}])
    x, t = normal(3, *SHAPE), torch.tensor([100.0, 500, 900])
    whole = job.net(x, t)
    for i in range(3):
        assert torch.allclose(job.net(x[i : i + 1], t[i : i + 1])[0], whole[i], atol=1e-5)


def test_while_it_learns_each_sample_of_a_mixed_batch_has_the_scale_of_its_own_time(
    tiny_net, tmp_path
):
    job = make_job(
        tiny_net.requires_grad_(False), tmp_path, rules(32, 6), num=4, boundaries=[166, 500, 833]
    )
    run_passes(job, ["fit_ranges"])
    dynamic_scales(job, warm_steps=3)
    # of 999, 666, 333, 0; one in each segment
    x, t, seen = normal(3, *SHAPE), job.calibration.t[[2, 0, 3]], {}
    torch.manual_seed(0)
    for q in input_quantizers(job.net).values():
        torch.nn.init.normal_(q.soft_scale.layers[-1].weight, std=0.05)
        assert (q.soft_scale().amax(0) > 1.01 * q.soft_scale().amin(0)).all()
    for m in job.net.modules():
        if isinstance(m, QuantLayer | QuantMatmul):
            m.register_forward_hook(lambda m, x, out: seen.__setitem__(m, (x, out)))
    job.net(x, t)
    for m, (operands, out) in seen.items():
        for n, time in enumerate(t):
            on_grid = []
            for a, q in zip(operands, input_quantizers(m).values(), strict=True):
                scale, zero = (
                    q.soft_scale.at(time[None])[0],
                    q.zero_point[job.net.timeline.segments_of(time)],
                )
                scale, zero = scale[q.group_of], zero[q.group_of]
                on_grid.append(((a[n] / scale).round() + zero).clamp(0, 63).sub(zero) * scale)
            expected = (
                on_grid[0] @ on_grid[-1]
                if isinstance(m, QuantMatmul)
                else m.operation(on_grid[0][None], m.weight, m.bias)[0]
            )
            assert_close(out[n].detach(), expected.detach(), 1e-5)
    assert sum(len(operands) for operands, _ in seen.values()) == len(input_quantizers(job.net))


def test_other_steps_get_their_table_from_the_same_mlp():
    soft = DynamicScale(TIMES, torch.tensor([0.1]))
    torch.nn.init.normal_(soft.layers[-1].weight, std=0.01)
    assert torch.equal(soft.at(TIMES), soft()) and soft.at(torch.arange(0, 1000, 50.0)).shape == (
        20,
        1,
    )


def test_retabulated_network_has_the_scales_of_its_functions_at_the_new_times(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(4, 6), num=12, boundaries=[300, 700])
    run_passes(job, ["fit_ranges", {"dynamic_scales": {"warm_steps": 20}}])
    x, old = normal(1, *SHAPE), job.net.timeline.segment_times(job.calibration.t).tolist()
    before, functions = [job.net(x, torch.tensor([t])) for t in old], functions_of(job.net)
    weights = {name: m.weight_int.clone() for name, m in quant_layers(job.net).items()}
    net = retabulated(job.net, functions, [*old, 100.0, 600.0])
    assert net.timeline.num_segments == 5
    # the steps that were there answer as before
    for t, expected in zip(old, before):
        assert torch.equal(net(x, torch.tensor([t])), expected)
    assert all(torch.equal(m.weight_int, weights[name]) for name, m in quant_layers(net).items())
    q, times = (
        input_quantizers(net)["conv_in.input_quantizer"],
        torch.tensor(sorted([*old, 100.0, 600.0])),
    )
    soft = DynamicScale(times, torch.ones(1))
    soft.load_state_dict(
        {
            k.partition("|")[2]: v
            for k, v in functions.items()
            if k.startswith("conv_in.input_quantizer|")
        }
    )
    assert torch.equal(q.scale, soft())
    with pytest.raises(ValueError, match="the functions of time do not belong to this network"):
        retabulated(net, {"other|layers.0.weight": torch.zeros(1)}, old)


def test_the_bypass_of_the_input_follows_the_steps(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(4, 6), num=12, boundaries=[300, 700])
    run_passes(job, ["fit_ranges", {"dynamic_scales": {"warm_steps": 3}}, "bypass_input"])
    old, gain = job.net.timeline.segment_times(job.calibration.t).tolist(), job.net.bypass.gain
    net = retabulated(job.net, functions_of(job.net), [*old, 10.0, 640.0])
    at = net.timeline.segments_of(torch.tensor([10.0, *old, 640.0]))
    assert len(gain.unique(dim=0)) == 3
    assert torch.equal(
        net.bypass.gain[at],
        gain[torch.tensor([0, *range(3), 1 if old[2] - 640 > 640 - old[1] else 2])],
    )
    assert net(normal(2, *SHAPE), torch.tensor([10.0, 990.0])).isfinite().all()


def test_widths_by_segment_follow_the_steps():
    rule = {"match": "a", "input": {"segment_bits": [4, 8], "range": "mse"}}
    plain = {"match": "b", "input": {"bits": 4}}
    assert retimed([plain, rule, {"balance": True}], [0, 1, 1]) == [
        plain,
        {"match": "a", "input": {"segment_bits": [4, 8, 8], "range": "mse"}},
        {"balance": True},
    ]


def test_one_segment_is_refused(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(32, 6))
    with pytest.raises(ValueError, match="need more than one time segment; set segments: per_step"):
        run_passes(job, ["fit_ranges", "dynamic_scales"])

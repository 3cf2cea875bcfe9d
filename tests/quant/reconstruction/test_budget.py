"""What a capture is expected to take is what a walk takes; what gives way, on graphs in closed
form."""

from dataclasses import replace

import pytest
import torch
import yaml
from tiny import EXAMPLE, make_job, rules, samples, walk

from base.files import PROJECT
from models.zoo import build_network
from quant.graph import Graph, trace
from quant.passes.run import run_passes
from quant.reconstruction.budget import GB, disk_budget, plan_capture
from quant.reconstruction.store import Store

FULL, HALF = torch.float32, torch.bfloat16


def chain(*skips, size=1):
    """u0 -> u1 -> ... -> u9, each of `size` values and one multiply-add; `skips` (i, j): unit j
    reads unit i too, whose outputs it adds."""
    units = [f"u{i}" for i in range(10)]
    reads = {unit: units[max(i - 1, 0) : i] for i, unit in enumerate(units)}
    arguments = {u: [(size, reads[u][0] if reads[u] else None)] for u in units}
    for i, j in skips:
        reads[units[j]] = [units[i], *reads[units[j]]]
        arguments[units[j]] = [(size, None)]
    return Graph(dict.fromkeys(units, 1), units, reads, arguments, dict.fromkeys(units, size))


def bytes_of(capture):
    return capture.memory, capture.disk, capture.wanted


def test_a_chain_keeps_input_and_output():
    """Of two networks, float32: 4 bytes each, what goes in, and what comes out of the first."""
    capture = plan_capture(chain(), 100, memory_gb=1, disk_gb=0)
    assert bytes_of(capture) == (3 * 400, 0, 3 * 400)
    assert (capture.exact, capture.passes, capture.dropped) == (True, 0, 0)


def test_a_skip_is_kept_on_top_and_its_sum_is_copied():
    """u8 reads u7 + u1. On the way there: the skip and an input of either network, an output."""
    capture = plan_capture(chain((1, 8)), 100, memory_gb=1, disk_gb=0)
    assert capture.memory == capture.wanted == 5 * 400
    assert capture.keep["u1"] == 8 and capture.keep["u2"] == 3


def test_what_does_not_fit_into_memory_goes_to_disk():
    capture = plan_capture(chain((1, 8)), 100, memory_gb=1600 / GB, disk_gb=1)
    assert bytes_of(capture) == (1600, 400, 2000) and capture.exact


def test_bfloat16_comes_first():
    capture = plan_capture(chain((1, 8)), 100, memory_gb=0, disk_gb=1000 / GB)
    assert capture.dtype == HALF and bytes_of(capture) == (0, 1000, 2000)
    assert (capture.passes, capture.dropped) == (0, 0) and not capture.exact


def test_then_skips_are_given_up_and_computed_again():
    """u1 runs again for u8, and u0 for u1: 2 of 10 units in both networks. What is left is an
    input of either and an output."""
    capture = plan_capture(chain((1, 8)), 100, memory_gb=0, disk_gb=800 / GB)
    assert capture.dtype == HALF and capture.dropped == 1
    assert capture.keep["u1"] == 2 and capture.keep["u7"] == 8
    assert capture.disk == 3 * 200 and capture.passes == pytest.approx(2 * 2 / 10)
    assert "1 of 10 outputs" in str(capture) and "0.40 forward passes" in str(capture)


def test_the_cheapest_skip_is_given_up_first():
    """u1 takes two units to compute again, u5 six."""
    graph = chain((1, 9), (5, 9))
    fits = plan_capture(graph, 100, memory_gb=0, disk_gb=10**6 / GB).disk // 2
    capture = plan_capture(graph, 100, memory_gb=0, disk_gb=(fits - 1) / GB)
    assert [n for n in graph.units if capture.keep[n] < graph.last_use[n]] == ["u1"]


def test_what_cannot_fit_is_told_with_its_size_and_key():
    with pytest.raises(ValueError, match=r"keeps 1\.5 GiB .*bfloat16.*memory_gb=0.*allows 1\.0; "):
        plan_capture(chain(size=2**20), 256, memory_gb=0, disk_gb=1)


@pytest.mark.parametrize("dtype, memory", [(FULL, 1.0), (FULL, 2e-5), (HALF, 0.0)])
def test_a_plan_is_what_two_streams_take(tiny_net, tmp_path, dtype, memory):
    graph = trace(tiny_net, EXAMPLE)
    large = plan_capture(graph, 10, memory_gb=memory, disk_gb=1)
    disk = 1 if dtype == FULL else 0.4 * large.disk / GB
    plan = plan_capture(graph, 10, memory_gb=memory, disk_gb=disk)
    assert plan.dtype == dtype and (plan.dropped > 0) == (dtype == HALF)
    store = Store(memory, tmp_path, plan.dtype)
    for _ in walk([tiny_net, tiny_net], graph, samples(10), store, plan.keep):
        pass
    assert (store.account.peak_memory, store.account.peak_disk) == (plan.memory, plan.disk)


def test_nothing_begins_where_nothing_fits(tiny_net, tmp_path):
    seen = []
    job = make_job(tiny_net, tmp_path, rules(4, 8), memory_gb=0, disk_gb=0, log=seen.append)
    with pytest.raises(ValueError, match="raise disk_gb or memory_gb"):
        run_passes(job, ["fit_ranges", "reconstruct"])
    assert not seen and not job.has_ranges


def test_a_run_that_gives_way_says_so_once(tiny_net, tmp_path):
    seen = []
    steps = {"weight_iters": 1, "input_iters": 1, "batch_size": 4}
    job = make_job(tiny_net, tmp_path, rules(4, 8), memory_gb=0, log=seen.append)
    room = plan_capture(job.graph, 10, memory_gb=0, disk_gb=1).disk * 0.4 / GB
    facts = run_passes(replace(job, disk_gb=room), ["fit_ranges", {"reconstruct": steps}])
    said = [line for line in seen if "kept in bfloat16" in line]
    assert [fact["capture"] for fact in facts if "capture" in fact] == said and len(said) == 1
    assert all(0 <= fact["error_after"] < 1 for fact in facts if "unit" in fact)


def test_disk_budget_is_what_is_free_unless_less_is_asked_for(tmp_path):
    free = disk_budget(None, tmp_path / "not" / "there")
    assert free > 0 and disk_budget(0.5, tmp_path) == min(0.5, free)
    assert disk_budget(1e9, tmp_path) == pytest.approx(free, rel=0.5)


@pytest.mark.parametrize(
    "name, samples, disk, passes", [("bedroom", 1280, 24, 0.2), ("sd-v1-4", 2560, 64, 0.6)]
)
def test_public_models_at_demo_counts(name, samples, disk, passes):
    """64 images of 20 steps, twice with guidance: on so many GiB of disk, for so many forward
    passes more."""
    network = yaml.safe_load((PROJECT / f"configs/model/{name}.yaml").read_text())["network"]
    with torch.device("meta"):
        net = build_network(**network)
    size, channels = network["image_size"], network["in_channels"]
    cond = {"bedroom": [], "sd-v1-4": [torch.zeros(1, 77, 768)]}
    graph = trace(net, [torch.zeros(1, channels, size, size), torch.zeros(1), *cond[name]])
    plan = plan_capture(graph, samples, memory_gb=4, disk_gb=disk)
    assert plan.wanted / GB > 2 * disk and not plan.exact
    assert 0 < plan.passes < passes and plan.disk <= disk * GB and plan.memory <= 4 * GB

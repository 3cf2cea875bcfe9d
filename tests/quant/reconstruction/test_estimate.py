"""What units are expected to take, against known costs and against finished runs."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import make_job, rules

from base.files import PROJECT
from quant.network import input_quantizers
from quant.passes.run import run_passes
from quant.reconstruction import estimate
from quant.reconstruction.estimate import (
    Beginning,
    Costs,
    Estimate,
    Rates,
    chosen,
    expected_seconds,
    work_of,
)
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import Trial

WORK = {
    "tiny": (1.0, 2.0, 3.0, 1.0),
    "many macs": (9e6, 3e3, 5e3, 3.0),
    "many values": (4e6, 8e4, 6e3, 4.0),
    "many weights": (5e6, 9e2, 3e5, 4.0),
    "between": (3e6, 1e3, 2e3, 2.0),
}
EACH = (2e-10, 1e-8, 5e-8, 1e-3)  # seconds of a mac, a value, a weight, a layer


def known(work, batch):
    return sum(each * w * n for each, w, n in zip(EACH, work, (batch, batch, 1, 1)))


def test_costs_that_are_linear_are_found_from_four_units():
    assert chosen(WORK) == ["tiny", "many macs", "many values", "many weights"]
    measured = [WORK[name] for name in chosen(WORK)]
    costs = Costs(measured, [known(work, 16) for work in measured], 16)
    assert costs.of(WORK["between"], 32) == pytest.approx(known(WORK["between"], 32), rel=1e-6)


def test_the_seconds_of_a_unit_are_those_of_its_parts():
    one = Costs([(1.0, 0.0, 0.0, 0.0)], [8.0], 8)  # a second for a multiply-add
    rates = Rates({"weight": one, "input": one}, one, one, 8, 64)
    found = rates.seconds((2.0, 7.0, 7.0, 7.0), {"weight": 3, "input": 5}, 100)
    # 2 networks x 100 samples; before and after each of 2 phases; steps of 8
    assert found == {"capture": 400, "errors": 4 * 100 * 2, "learning": 8 * 8 * 2}
    assert rates.seconds((2.0, 0, 0, 0), {"weight": 0}, 1000, 1.0) == {
        "capture": 1.5 * 4000,
        "errors": 2 * 128 * 2,
        "learning": 0,
    }


def test_second_order_beginnings_grow_with_columns_their_squares_and_cubes(monkeypatch):
    def seconds(columns):
        return 1e-3 * columns + 1e-12 * (8192 * columns**2 + 6 * columns**3)

    def measure(self, columns, *_):
        return 0.064 if columns == 64 else seconds(columns)  # of a small one only its columns tell

    monkeypatch.setattr(Beginning, "_measure", measure)
    begin = Beginning(torch.device("cpu"))
    assert begin.of([100, 2000]) == pytest.approx(seconds(100) + seconds(2000))
    nothing = Costs([(1.0, 0.0, 0.0, 0.0)], [1.0], 1)
    rates = Rates({"joint": nothing}, nothing, nothing, 16, 64, begin)
    found = rates.seconds((0.0, 0, 0, 0), {"joint": 5}, 10, 0.0, [100])
    assert found == {"capture": 0, "errors": 0, "learning": pytest.approx(seconds(100))}


def test_a_measured_beginning_takes_time():
    begin = Beginning(torch.device("cpu"))
    assert 0 < begin.of([64]) < begin.of([64, 64]) < begin.of([4096])


def test_what_is_left_follows_what_finished_units_took():
    left = Estimate({"a": 10.0, "b": 30.0, "c": 60.0})
    assert left.left == 100
    left.finished("a", None)  # was there already
    assert left.left == 90
    left.finished("b", 60.0)  # twice as long as expected, beside 5 seconds of trust
    assert left.left == pytest.approx(60 * 65 / 35)
    left.finished("c", 1.0)
    assert left.left == 0


@pytest.mark.parametrize("model", ["latent-compact", "cifar10-compact"])
def test_finished_runs_are_foretold_within_a_factor_of_a_half_more(model):
    """Q-Diffusion at 200 and 50 steps of 16 samples, one thread held to AVX2: seconds of every
    unit's phases, from its passes.jsonl, of which the estimate sees those of four units."""
    rows = json.loads((PROJECT / "tests/fixtures/unit_seconds.json").read_text())[model]
    work = {name: tuple(row[:4]) for name, row in rows.items()}
    for column in (4, 5):
        took = {name: row[column] for name, row in rows.items()}
        measured = chosen(work)
        costs = Costs([work[n] for n in measured], [took[n] for n in measured], 16)
        left = Estimate({name: costs.of(work[name], 16) for name in rows})
        names = list(rows)
        for i, name in enumerate(names[:-2]):  # the last ones are over within a second
            left.finished(name, took[name])
            truth = sum(took[n] for n in names[i + 1 :])
            assert truth / 1.5 < left.left < 1.5 * truth, (column, name)


@pytest.mark.parametrize("joint", [False, True])
def test_every_unit_of_a_network_is_foretold_and_the_run_says_what_is_left(
    tiny_net, tmp_path, monkeypatch, joint
):
    counts = {"weight": 27, "input": 5, "joint": 27}
    monkeypatch.setattr(  # a second for every layer and step
        Trial,
        "seconds",
        lambda trial, phase, objective, schedule, steps: float(steps * layers[trial.name]),
    )
    monkeypatch.setattr(Trial, "seconds_of_passing", lambda trial, size, on: (1e-9, 1e-9))
    monkeypatch.setattr(estimate, "chosen", list)  # all of them
    lines = []
    job = make_job(tiny_net, tmp_path, rules(4, 8), log=lines.append)
    layers = {name: work[3] for name, work in work_of(tiny_net, job.graph).items()}
    job.fit_ranges()
    schedule = Schedule(weight_iters=27, input_iters=5, batch_size=4, joint=joint)
    found = expected_seconds(job, Objective(), schedule, 0.0)
    phases = ["joint"] if joint else ["weight", "input"]
    for name, seconds in found.items():
        assert seconds == pytest.approx(layers[name] * sum(counts[p] for p in phases), rel=0.2)
    few = replace(schedule, weight_iters=10)  # not measured: shares by multiply-adds
    shares, macs = expected_seconds(job, Objective(), few, 0.0), job.graph.work
    assert sum(shares.values()) > 0 and all(
        shares[name] / sum(shares.values()) == pytest.approx(macs[name] / sum(macs.values()))
        for name in macs
    )
    options = {"weight_iters": 1, "input_iters": 1, "batch_size": 2, "joint": joint}
    job = make_job(tiny_net, tmp_path, rules(4, 8), log=lines.append)
    torch.manual_seed(0)
    run_passes(job, ["fit_ranges", {"reconstruct": options}])
    assert len(lines) == len(found) and lines[-1].endswith("about 0 s left")
    assert all(q.drop is None for q in input_quantizers(job.net).values())

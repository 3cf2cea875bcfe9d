"""Steps that are tried on the side: how many, of what, and that nothing stays of them."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import make_job, rules

from quant.graph import Graph
from quant.network import input_quantizers
from quant.reconstruction import learn, trial
from quant.reconstruction.capture import inputs_of
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.trial import STEPS, Trial, first_large, seconds_by_dtype

GRAPH = Graph({"a": 2, "b.x": 5, "b.y": 4, "bb": 9, "c": 1}, ["a", "b", "bb", "c"], {}, {}, {})


def test_the_first_unit_above_the_average_is_tried():
    assert GRAPH.work == {"a": 2, "b": 9, "bb": 9, "c": 1}
    assert first_large(GRAPH) == "b"


@pytest.mark.parametrize("fitted", [False, True])
def test_a_trial_takes_its_steps_and_leaves_the_network_as_it_was(
    tiny_net, tmp_path, monkeypatch, fitted
):
    job = make_job(tiny_net, tmp_path, rules(4, 8), boundaries=(500.0,))
    if fitted:
        job.fit_ranges()
    before, taken = copy.deepcopy(job.net.state_dict()), []
    monkeypatch.setattr(
        trial, "timed", lambda call, device, clock: call() or 1.0
    )  # what is measured is not the point
    optimise = learn.optimise

    def count(lesson, groups, iters, *more):
        taken.append((iters, sum(len(group["params"]) for group in groups)))
        return optimise(lesson, groups, iters, *more)

    monkeypatch.setattr(learn, "optimise", count)
    unit = first_large(job.graph)
    arguments = inputs_of(tiny_net, [unit], job.calibration.rows(slice(0, 1)), 1, whole=True)[unit]
    one = Trial(job.net, unit, tiny_net.get_submodule(unit), arguments, job.calibration.t)
    schedule = Schedule(weight_iters=7, input_iters=5, batch_size=4, gptq=True)
    assert one.phases(schedule) == {"weight": 7, "input": 5}
    joint = replace(schedule, joint=True)
    assert one.phases(joint) == {"joint": 7}
    for phase, how in (("weight", schedule), ("input", schedule), ("joint", joint)):
        assert one.seconds(phase, Objective(layer_weight=0.5, saliency=0.5), how) == 1.0
    module = job.net.get_submodule(unit)
    layers, quantizers = (len(found) for found in trial._learned(module))
    assert quantizers == len(input_quantizers(module))
    assert taken == [(STEPS, layers), (STEPS, quantizers), (STEPS, layers + quantizers)]
    after = job.net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k].nan_to_num(), after[k].nan_to_num()) for k in before)
    assert all(q.enabled and q.drop is None for q in input_quantizers(job.net).values())


def test_data_types_are_compared_by_medians_of_all_steps_the_first_round_left_out():
    class Known:
        """Seconds of STEPS steps: ten of the first round, then as listed."""

        def __init__(self):
            self.rounds = {
                ("fp32", "weight"): [10, 3, 9, 3],
                ("fp32", "input"): [10, 6, 6, 6],
                ("bf16", "weight"): [10, 1.5, 1.5, 99],
                ("bf16", "input"): [10, 3, 3, 3],
            }

        def phases(self, schedule):
            return {"weight": 30, "input": 10, "joint": 0}

        def seconds(self, phase, objective, schedule):
            return self.rounds[schedule.dtype, phase].pop(0)

    found = seconds_by_dtype(Known(), Objective(), Schedule())
    # (30 * 3 + 10 * 6) / 3 steps each / 40 steps
    assert found == pytest.approx({"fp32": 150 / STEPS / 40, "bf16": 75 / STEPS / 40})

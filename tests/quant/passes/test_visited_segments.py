"""Which time segments reconstruction takes its batches from (active timestep selection)."""

import torch
from lessons import TABLE, quantizer
from tiny import make_job

from quant.passes import reconstruct
from quant.passes.run import run_passes
from quant.reconstruction.learn import Lesson, draw_rows
from quant.reconstruction.settings import Objective, Schedule
from quant.reconstruction.unit import Unit


def test_steps_are_visited_by_turns_when_undecided_alike_and_the_undecided_first():
    class Soft(torch.nn.Module):
        def __init__(self, entropy):
            super().__init__()
            self.value = torch.tensor(entropy)

        def entropy(self):
            return self.value

    def visits(entropy, rounds, active, segments=torch.arange(3).repeat(4), visit_cost=0.0):
        schedule = Schedule(batch_size=5, active=active, visit_cost=visit_cost)
        module = torch.nn.Module()
        module.q = quantizer(TABLE[:3])
        module.q.soft_scale = Soft(entropy)
        unit = Unit(
            "x", module, torch.device("cpu"), None, segments=segments, visits=torch.zeros(3)
        )
        order, target = [], torch.zeros(12)
        for _ in range(rounds):
            generator = torch.Generator().manual_seed(0)
            rows = draw_rows(Lesson(unit, [], target, generator, Objective(), schedule))
            assert len(rows) == 5 and len(unit.segments[rows].unique()) == 1
            order.append(int(unit.segments[rows][0]))
        return order, unit.visits

    order, counts = visits([0.5, 0.5, 0.5], 10, 1.5)
    assert counts.max() - counts.min() <= 1
    order, counts = visits([0.1, 0.9, 0.1], 10, 1.5)
    assert order[0] == 1 and set(order) == {0, 1, 2} and counts[1] == counts.max()
    # no sample in segment 1
    order, counts = visits([0.1, 0.9, 0.1], 10, 1.5, torch.tensor([0, 2]).repeat(6))
    assert set(order) == {0, 2} and counts[1] == 0
    # 0.9; -1.1, so 0.1 and 0.1; -1.1; -1.9 each
    order, counts = visits([0.1, 0.9, 0.1], 6, 0.0, visit_cost=2.0)
    assert order == [1, 0, 2, 1, 0, 2] and counts.tolist() == [2, 2, 2]


def test_reconstruction_visits_the_segments_by_turns(tiny_net, tmp_path, monkeypatch):
    """Entropies differ, but have no say beside so large a weight of what was seldom visited."""
    units = []
    monkeypatch.setattr(
        reconstruct, "Unit", lambda *a, **more: units.append(Unit(*a, **more)) or units[-1]
    )
    job = make_job(
        tiny_net,
        tmp_path,
        [{"match": "mid.*", "input": {"bits": 6}}],
        num=12,
        boundaries=[200, 400],
    )
    run_passes(
        job,
        [
            "fit_ranges",
            {"group_scales": {"groups": 2}},
            {"reconstruct": {"input_iters": 6, "batch_size": 4, "active": 1e6}},
        ],
    )
    assert [unit.visits.tolist() for unit in units if unit.name.startswith("mid")] == [
        [2, 2, 2]
    ] * 3
    # of 999, 908, .. 0
    assert all(unit.segments.tolist() == [2] * 7 + [1] * 2 + [0] * 3 for unit in units)

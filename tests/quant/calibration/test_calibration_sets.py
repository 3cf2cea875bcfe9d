"""Calibration sets: samples are picked, ordered and batched as they say."""

import pytest
import torch
from tiny import samples

from quant.calibration.dataset import CalibrationSet
from quant.timeline import Timeline


def test_subset_is_drawn_without_replacement_by_seed():
    whole = CalibrationSet(
        torch.arange(20.0)[:, None, None, None],
        torch.arange(20.0),
        torch.arange(20),
        torch.arange(20),
        made={"a": 1},
    )
    part, again, other = (whole.subset(8, Timeline(), seed) for seed in (0, 0, 1))
    assert len(part.t.unique()) == 8 and part.made == {"a": 1}
    assert torch.equal(part.x.flatten(), part.t) and torch.equal(
        part.arguments(slice(0, 8))[2], part.t.long()
    )
    assert torch.equal(part.t, again.t) and not torch.equal(part.t, other.t)
    assert sorted(whole.subset(50, Timeline(), 0).t.tolist()) == list(range(20))
    assert sorted(whole.subset(None, Timeline(), 0).t.tolist()) == list(range(20))


def test_a_subset_leaves_no_time_segment_empty():
    whole = CalibrationSet(torch.zeros(40, 1, 1, 1), torch.arange(40.0))
    tenths = Timeline([10.0, 20, 30, 39.5, 100])  # the last holds no sample at all
    few = whole.subset(2, tenths, 0)
    assert torch.equal(few.t[:2], whole.subset(2, Timeline(), 0).t)
    assert tenths.segments_of(few.t).unique().tolist() == [0, 1, 2, 3] and len(few) <= 5
    assert len(whole.subset(38, Timeline([20.0]), 0)) == 38


def test_stretches_are_all_successive_samples_of_a_trajectory():
    t = torch.tensor([5.0, 9, 1, 7, 3, 8, 2, 6])
    whole = CalibrationSet(
        torch.zeros(8, 1, 1, 1), t, trajectory=torch.tensor([0, 1, 0, 0, 2, 0, 1, 0])
    )
    assert t[whole.stretches(3)].tolist() == [[8, 7, 6], [7, 6, 5], [6, 5, 1]]
    assert t[whole.stretches(2)].tolist() == [[8, 7], [7, 6], [6, 5], [5, 1], [9, 2]]
    assert sorted(whole.stretches(1).tolist()) == [[i] for i in range(8)]
    part = whole.rows(torch.tensor([1, 6, 3]))
    assert part.t[part.stretches(2)].tolist() == [[9, 2]]
    assert torch.equal(whole.stretches(6), whole.stretches(5))  # the longest has 5
    with pytest.raises(ValueError, match="does not say on which trajectory"):
        CalibrationSet(whole.x, t).stretches(2)


def test_batches_are_in_order_and_complete():
    whole = samples(10)
    sizes, parts = [len(x) for x, _ in whole.batches(4)], list(zip(*whole.batches(4)))
    assert sizes == [4, 4, 2]
    assert torch.equal(torch.cat(parts[0]), whole.x) and torch.equal(torch.cat(parts[1]), whole.t)


def test_thinned_is_an_even_pick():
    whole = CalibrationSet(torch.zeros(10, 1, 1, 1), torch.arange(10.0))
    assert whole.thinned(4).t.tolist() == [0, 3, 6, 9]
    assert whole.thinned(99).t.tolist() == list(range(10))

"""Steps to segments."""
import pytest
import torch
from torch import nn

from quant.timeline import Timeline


@pytest.mark.parametrize("t, segment", [(0, 0), (99, 0), (99.9, 0), (100, 1), (499, 1), (500, 2), (999, 2)])
def test_a_segment_begins_at_its_boundary(t, segment):
    timeline = Timeline([500, 100])                        # any order
    timeline.set_time(torch.tensor([t, t]))
    assert timeline.num_segments == 3 and timeline.segment == segment and isinstance(timeline.segment, int)


def test_mixed_batch_has_a_segment_for_each_sample():
    timeline = Timeline([100, 500])
    timeline.set_time(torch.tensor([700, 0, 100]))
    assert timeline.segment.tolist() == [2, 0, 1]


def test_segments_equal_a_count_of_boundaries():
    timeline, t = Timeline([3, 7, 8]), torch.arange(12)
    timeline.set_time(t)
    assert timeline.segment.tolist() == [sum(b <= step for b in (3, 7, 8)) for step in range(12)]


def test_without_boundaries_there_is_one_segment():
    timeline = Timeline()
    timeline.set_time(torch.tensor([5.0, 900.0]))
    assert timeline.num_segments == 1 and timeline.segment == 0


def test_time_is_read_from_every_forward_pass_whatever_came_before():
    class Net(nn.Module):
        def forward(self, x, t):
            return x
    net, timeline = Net(), Timeline([10])
    timeline.follow(net)
    for t in (20, 0, 20, 20, 9):
        net(torch.zeros(1), torch.tensor([t]))
        assert timeline.segment == int(t >= 10)

"""Steps to segments."""

import re

import pytest
import torch
from torch import nn

from quant.network import QuantizedNet
from quant.timeline import Timeline, segment_boundaries


@pytest.mark.parametrize(
    "t, segment", [(0, 0), (99, 0), (99.9, 0), (100, 1), (499, 1), (500, 2), (999, 2)]
)
def test_a_segment_begins_at_its_boundary(t, segment):
    timeline = Timeline([500, 100])  # any order
    timeline.set_time(torch.tensor([t, t]))
    assert (
        timeline.num_segments == 3
        and timeline.segment == segment
        and isinstance(timeline.segment, int)
    )


def test_mixed_batch_has_a_segment_for_each_sample():
    timeline = Timeline([100, 500])
    timeline.set_time(torch.tensor([700, 0, 100]))
    assert timeline.segment.tolist() == [2, 0, 1]


def test_segments_equal_a_count_of_boundaries():
    timeline, t = Timeline([3, 7, 8]), torch.arange(12)
    timeline.set_time(t)
    assert timeline.segment.tolist() == [sum(b <= step for b in (3, 7, 8)) for step in range(12)]


def test_restricted_to_some_steps_there_are_their_segments_alone():
    timeline = Timeline([10, 20, 30, 40])
    few = timeline.restricted_to(torch.tensor([45.0, 5.0, 22.0, 28.0]))
    assert few.num_segments == 3 and few.segment.tolist() == [2, 0, 1, 1]
    assert timeline.num_segments == 5 and timeline.segment == 0
    assert timeline.restricted_to(torch.tensor([22.0, 28.0])).num_segments == 1


def test_without_boundaries_there_is_one_segment():
    timeline = Timeline()
    timeline.set_time(torch.tensor([5.0, 900.0]))
    assert timeline.num_segments == 1 and timeline.segment == 0


def test_time_is_read_from_every_forward_pass_whatever_came_before():
    class Net(nn.Module):
        def forward(self, x, t):
            return x

    timeline = Timeline([10])
    net = QuantizedNet(Net(), timeline)
    for t in (20, 0, 20, 20, 9):
        net(torch.zeros(1), torch.tensor([t]))
        assert timeline.segment == int(t >= 10)


@pytest.mark.parametrize(
    "segments, sizes", [(1, [100]), (3, [34, 33, 33]), (4, [25] * 4), ("per_step", [1] * 100)]
)
def test_sampler_steps_are_shared_out_evenly_counted_from_the_noise(segments, sizes):
    times = [10.0 * i for i in range(100)]
    line = Timeline(segment_boundaries(reversed(times), segments))
    assert line.segments_of(torch.tensor(times)).bincount().tolist() == sizes


def test_boundaries_can_be_given_as_network_times():
    line = Timeline(segment_boundaries([0, 100, 300], [300, 50.5]))
    assert line.segments_of(torch.tensor([0.0, 50, 51, 299, 300])).tolist() == [0, 0, 1, 1, 2]


def test_another_step_count_finds_the_nearest_step():
    line = Timeline(segment_boundaries([0, 100, 300], "per_step"))
    assert line.segments_of(torch.tensor([20.0, 49, 51, 199, 201, 999])).tolist() == [
        0,
        0,
        1,
        1,
        2,
        2,
    ]


@pytest.mark.parametrize(
    "segments, sentence",
    [
        (4, "4 time segments asked for, the sampler has 3 steps; choose 1 to 3"),
        (0, "0 time segments asked for"),
        (
            "per_stp",
            "segments 'per_stp' is neither a number, a list nor a known word; did you mean "
            "'per_step'?",
        ),
        (
            [20, 50],
            "segments [20, 50]: no step of the sampler lies between 20 and 50; its network times "
            "are 0 to 300",
        ),
        ([301], "no step of the sampler lies between 301 and inf"),
        ([0], "no step of the sampler lies between -inf and 0"),
        (["a"], "segments ['a'] must be network times, such as [300, 700]"),
    ],
)
def test_impossible_segments(segments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        segment_boundaries([0, 100, 300], segments)


def test_mean_time_of_every_segment():
    line = Timeline([50])
    assert line.segment_times(torch.tensor([10.0, 20, 90])).tolist() == [15, 90]
    with pytest.raises(ValueError, match="no sample in time segment 1 of 2"):
        line.segment_times(torch.tensor([10.0, 20]))

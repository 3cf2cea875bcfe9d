"""Timing with a clock that the calls themselves move: every number is known."""

import os
import time

import pytest

from tinydm.benchmark import harness
from tinydm.benchmark.harness import FEWEST, SLICE, busy_ticks, measure, times_faster


class Machine:
    """A clock, calls that take known seconds of it, and the share that others take by round."""

    def __init__(self, shares=()):
        self.now, self.log, self.shares, self.elsewhere = 0.0, [], list(shares), 0.0
        self.waiting, self.asked = 0.0, None

    def call(self, name, *seconds):
        """Takes these seconds in turn, the last of them from then on."""
        left = list(seconds)

        def run():
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run

    def clock(self):
        return self.now

    def busy(self):
        """Asked at the beginning and at the end of every round."""
        if self.asked is None:
            self.asked = self.now
        else:
            self.elsewhere += self.shares.pop(0) * (self.now - self.asked)
            self.asked = None
        return self.elsewhere

    def measure(self, calls, rounds=3, budget=1e9, **how):
        return measure(calls, rounds=rounds, budget=budget, clock=self.clock, **how)


def test_calls_take_turns_and_short_ones_are_repeated():
    machine = Machine()
    calls = {"a": machine.call("a", 1.0), "b": machine.call("b", 0.125)}
    timing = machine.measure(calls)
    assert timing.seconds == {"a": [1.0] * 3, "b": [0.125] * 3}
    rounds = "".join(machine.log)[-3 * 4 :]  # a slice is at least 0.25 s: half of ROUND
    assert rounds == "abbb" * 3
    assert (timing.num_clean, timing.failed) == (3, {})


def test_no_slice_is_shorter_than_it_should_be():
    machine = Machine()
    calls = {str(i): machine.call(str(i), 0.003) for i in range(40)}
    machine.measure(calls, rounds=1)
    assert machine.log[-40 * 8 :] == [name for name in calls for _ in range(8)]  # 24 ms
    assert 0.003 * 7 >= SLICE > 0.003 * 6


def test_first_calls_do_not_count():
    machine = Machine()
    timing = machine.measure({"a": machine.call("a", 60.0, 2.0)}, rounds=2)
    assert timing.seconds == {"a": [2.0, 2.0]}


def test_rounds_in_which_others_were_busy_are_dropped():
    machine = Machine(shares=[0.0, 0.5, 0.05, 0.07, 0.04])
    calls = {"a": machine.call("a", 9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0)}
    timing = machine.measure(calls, rounds=3, busy_elsewhere=machine.busy)
    assert timing.others == pytest.approx([0.0, 0.5, 0.05, 0.07, 0.04])
    assert timing.seconds == {"a": [1.0, 2.0, 3.0, 4.0, 5.0]}
    assert timing.clean() == {"a": [1.0, 3.0, 5.0]} and timing.num_clean == 3


def test_where_others_cannot_be_seen_nothing_is_dropped():
    timing = Machine().measure({})
    assert (timing.seconds, timing.others) == ({}, [])
    machine = Machine()
    timing = machine.measure({"a": machine.call("a", 1.0)}, busy_elsewhere=lambda: None)
    assert timing.others == [None] * 3 and timing.num_clean == 3


@pytest.mark.parametrize(
    "busy, rounds",
    [
        ([0], FEWEST),  # 2, 4, 6 s; time was up after 5
        ([0, 1, 0, 1, 0], 5),
        ([1] * 20, 8),  # 15 s, three times as many
    ],
)
def test_when_time_is_up_a_few_clean_rounds_are_enough(busy, rounds):
    machine = Machine(shares=[*busy, *[0] * 30])
    calls = {"a": machine.call("a", 2.0)}
    timing = machine.measure(calls, rounds=30, budget=5, busy_elsewhere=machine.busy)
    assert len(timing.others) == rounds


def test_a_call_that_fails_is_left_out_with_its_reason():
    def broken():
        raise RuntimeError("not\n  here")

    machine = Machine()
    timing = machine.measure({"a": machine.call("a", 1.0), "b": broken}, rounds=1)
    assert timing.seconds == {"a": [1.0]} and timing.failed == {"b": "RuntimeError: not here"}
    assert harness.one_line(ValueError("a sentence")) == "a sentence"
    assert len(harness.one_line(ValueError("a" * 999))) == 200


def test_what_a_call_has_begun_is_waited_for():
    machine = Machine()

    def launch():
        machine.waiting += 1.0

    def finish():
        machine.now, machine.waiting = machine.now + machine.waiting, 0.0

    assert machine.measure({"a": launch}, rounds=1, finish=finish).seconds == {"a": [1.0]}


def test_the_ratio_is_the_median_over_rounds():
    base, other = [8.0, 2.0, 90.0], [2.0, 1.0, 30.0]
    assert times_faster(base, other) == 3.0  # of 4, 2 and 3; the ratio of the medians is 4
    assert times_faster([], []) is None


def test_ticks_of_all_processors_but_idle_ones():
    stat = "cpu  1 2 4 1000 1000 8 16 32 5 5\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert busy_ticks(stat) == 63


def test_own_time_is_not_that_of_others(tmp_path, monkeypatch):
    per_second, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count()
    monkeypatch.setattr(harness, "STAT", tmp_path / "stat")
    assert harness.busy_elsewhere() is None
    monkeypatch.setattr(time, "process_time", lambda: 3.0)
    (tmp_path / "stat").write_text(f"cpu  {(3 + 2 * cores) * per_second} 0 0 9 9 0 0 0 0 0\n")
    assert harness.busy_elsewhere() == pytest.approx(2.0)

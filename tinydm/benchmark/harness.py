"""Time several calls against each other in one process: A B C A B C ...

A slice repeats one call for SLICE seconds at least, a round is one slice of each. What two calls
have in common, such as a clock that falls, meets both in the same round, so that ratios are taken
round by round and their median is the answer. A round in which other processes took more than
CONTENDED of the machine is dropped: with as many threads as cores one busy neighbour makes a call
three times slower, and not every call alike."""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

Call = Callable[[], object]
SLICE = 0.02  # seconds
ROUND = 0.5  # seconds that a round lasts at least: the system counts time in hundredths
CONTENDED = 0.06  # share of the machine's processor time
FEWEST = 3  # clean rounds to go on for when time is up
PATIENCE = 3  # times the time, after which they are not waited for
STAT = Path("/proc/stat")


@dataclass
class Timing:
    """What was measured: seconds of one call, by name and round; the share of the machine that
    other processes took in each round (None where that cannot be seen); why a call failed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    others: list[float | None] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def clean(self) -> dict[str, list[float]]:
        """The seconds of the rounds in which the machine was ours."""
        kept = [i for i, share in enumerate(self.others) if is_clean(share)]
        return {name: [values[i] for i in kept] for name, values in self.seconds.items()}

    @property
    def num_clean(self) -> int:
        return sum(map(is_clean, self.others))


def is_clean(share: float | None) -> bool:
    return share is None or share <= CONTENDED


def times_faster(base: list[float], other: list[float]) -> float | None:
    """The median over rounds of the seconds of `base` by those of `other`; None without rounds."""
    ratios = [a / b for a, b in zip(base, other)]
    return statistics.median(ratios) if ratios else None


def measure(
    calls: Mapping[str, Call],
    *,
    rounds: int,
    budget: float,
    finish: Call = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    busy_elsewhere: Callable[[], float | None] | None = None,
) -> Timing:
    """Times the calls until `rounds` rounds were clean. When `budget` seconds have passed, FEWEST
    are enough; after PATIENCE times that it ends in any case. `finish` waits for what a call has
    begun (a GPU). A call that raises in its warm-up is left out, with the reason.

    `busy_elsewhere()` is the processor time in seconds that other processes have had so far, as a
    share of which the machine has one a second; None: nothing is dropped."""
    timing, repeats = Timing(), {}
    slice_seconds = max(SLICE, ROUND / max(len(calls), 1))

    def seconds_of(call, count):
        start = clock()
        for _ in range(count):
            call()
        finish()
        return clock() - start

    for name, call in calls.items():
        try:
            seconds_of(call, 1)  # packs weights, compiles, chooses kernels
            repeats[name] = _enough(lambda count: seconds_of(call, count), slice_seconds)
        except Exception as error:
            timing.failed[name] = one_line(error)
    timing.seconds = {name: [] for name in repeats}
    begun = clock()
    while repeats:
        elsewhere, start = busy_elsewhere and busy_elsewhere(), clock()
        for name, count in repeats.items():
            timing.seconds[name].append(seconds_of(calls[name], count) / count)
        took = None if elsewhere is None else busy_elsewhere() - elsewhere
        timing.others.append(None if took is None else took / (clock() - start))
        spent = (clock() - begun) / budget
        if timing.num_clean >= (rounds if spent < 1 else min(FEWEST, rounds)) or spent > PATIENCE:
            break
    return timing


def _enough(seconds_of, wanted):
    """How many calls last `wanted` seconds; as many, and a few more, have been made then."""
    count = 1
    while (seconds := seconds_of(count)) < wanted:
        count = max(count + 1, math.ceil(1.1 * count * wanted / max(seconds, 1e-9)))
    return count


def one_line(error: Exception) -> str:
    """What an error says, in one line of at most 200 characters."""
    said = " ".join(str(error).split()) or "no reason given"
    said = said if len(said) <= 200 else f"{said[:197]}..."
    return said if isinstance(error, ValueError) else f"{type(error).__name__}: {said}"


def busy_elsewhere() -> float | None:
    """Seconds that processes other than this one have kept the processor busy so far, as a share
    of the whole machine: all its cores busy for a second are one. None where the system does not
    count it."""
    if not STAT.is_file():
        return None
    return (busy_ticks(STAT.read_text()) / os.sysconf("SC_CLK_TCK") - time.process_time()) / (
        os.cpu_count() or 1
    )


def busy_ticks(stat: str) -> int:
    """Of the text of /proc/stat: user, nice, system, irq, softirq and steal of all processors."""
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.split("\n")[0].split()[1:9])
    return user + nice + system + irq + softirq + steal

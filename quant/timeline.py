"""Time as an axis: which segment k(t) = #{b : b <= t} of the denoising trajectory a forward pass
belongs to.

With one segment for every sampled step, each activation has a scale of its own there: x_q = s[k(t)]
(code - z[k(t)]), the finite-set calibration of TFMQ-DM (Huang et al. 2024, arXiv:2311.16503)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from base.errors import unknown_word

PER_STEP = "per_step"


def segment_boundaries(times: Iterable[float], segments: int | str | Sequence) -> list[float]:
    """Boundaries that cut a sampler's network times (in any order) into `segments`: k parts of as
    equal numbers of steps as possible; "per_step", one for each time; or a list of the boundaries
    themselves. Those that are chosen here lie midway between neighbouring times, so that another
    step count finds the nearest segment. Raises ValueError for a segment without any time."""
    times = sorted(set(map(float, times)))
    if isinstance(segments, (list, tuple)):
        return checked_boundaries(times, segments)
    count = len(times) if segments == PER_STEP else segments
    if not isinstance(count, int) or isinstance(count, bool):
        complaint = f"segments '{segments}' is neither a number, a list nor a known word"
        raise ValueError(unknown_word(complaint, str(segments), [PER_STEP]))
    if not 1 <= count <= len(times):
        raise ValueError(
            f"{count} time segments asked for, the sampler has {len(times)} steps; choose 1 to "
            f"{len(times)}"
        )
    # Counted from the noisy end, as samplers do: 100 steps in 3 parts are 33, 33 and 34.
    cuts = [len(times) - i * len(times) // count for i in range(1, count)]
    return sorted((times[cut - 1] + times[cut]) / 2 for cut in cuts)


def checked_boundaries(times: Sequence[float], boundaries: Sequence) -> list[float]:
    """The boundaries as ascending floats. Raises ValueError for what is no number, and where none
    of the ascending `times` lies between two."""
    if any(isinstance(b, bool) or not isinstance(b, (int, float)) for b in boundaries):
        raise ValueError(f"segments {list(boundaries)} must be network times, such as [300, 700]")
    ends = [float("-inf"), *sorted(map(float, boundaries)), float("inf")]
    for low, high in zip(ends, ends[1:]):
        if not any(low <= t < high for t in times):
            raise ValueError(
                f"segments {list(boundaries)}: no step of the sampler lies between {low:g} and "
                f"{high:g}; its network times are {times[0]:g} to {times[-1]:g}"
            )
    return ends[1:-1]


class Timeline:
    """Segments of the axis of network times. `boundaries` are times, kept ascending; t lies in
    segment #{b : b <= t}. Without boundaries there is one segment and every quantizer is static.

    `segment` is an int, or (N,) when the samples of a batch lie in several segments; the network
    sets it by the t that it is called with, so that no call is ever counted."""

    def __init__(self, boundaries: Iterable[float] = ()):
        self.boundaries = torch.tensor(sorted(boundaries), dtype=torch.float32)
        self.segment: int | torch.Tensor | slice = 0

    @property
    def num_segments(self) -> int:
        """One more than boundaries."""
        return len(self.boundaries) + 1

    def set_time(self, t: torch.Tensor) -> None:
        """Tell it the network times t (N,) of the samples in the coming forward pass."""
        if self.num_segments == 1:
            return
        segment = self.segments_of(t.cpu())  # a GPU is waited for here, once, and nowhere else
        is_one = bool((segment == segment[0]).all())
        self.segment = int(segment[0]) if is_one else segment.to(t.device)

    def restricted_to(self, t: torch.Tensor) -> Timeline:
        """A timeline of the segments that hold the times t (N,) alone, set to these, for trials."""
        known = self.segments_of(t).float().unique()
        few = Timeline(((known[1:] + known[:-1]) / 2).tolist())
        few.set_time(self.segments_of(t))
        return few

    def segments_of(self, t: torch.Tensor) -> torch.Tensor:
        """Segment of every time t (N,)."""
        return torch.bucketize(t.float(), self.boundaries.to(t.device), right=True)

    def segment_times(self, t: torch.Tensor) -> torch.Tensor:
        """Mean time of each segment over t (N,) -> (segments,); ValueError for one without any."""
        segment, times = self.segments_of(t), []
        for s in range(self.num_segments):
            own = t[segment == s].float()
            if not len(own):
                raise ValueError(
                    f"calibration data hold no sample in time segment {s} of {self.num_segments}; "
                    "add steps to the calibration set or use fewer segments"
                )
            times.append(own.mean())
        return torch.stack(times)

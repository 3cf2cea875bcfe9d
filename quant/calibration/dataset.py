"""Calibration sets: what the network sees on its way from noise to image, and how it was collected.

Axes: N samples, S evaluations of the network on a trajectory (step 0 is the noisiest), B images of
a recorded batch, K conditions, C channels, H x W pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from base.files import save_tensors
from quant.timeline import Timeline

FORMAT = "tinydm-calibration/1"


@dataclass
class CalibrationSet:
    """x (N, C, H, W) float32 network inputs, t (N,) their steps, and how they were made. A
    conditional network's set also has `cond` (K, ...), the distinct conditions (contexts or class
    labels), and `which` (N,), the row of each sample: a text context is far larger than an image
    and the same at every step. `trajectory` (N,) numbers the trajectory that a sample lies on,
    where that is known."""

    x: torch.Tensor
    t: torch.Tensor
    cond: torch.Tensor | None = None
    which: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None
    made: dict[str, Any] = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def subset(self, num: int | None, timeline: Timeline, seed: int) -> CalibrationSet:
        """Returns `num` samples drawn without replacement (None, or if there are fewer: all), and
        one more of every segment of a timeline that these leave without any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segments = timeline.segments_of(self.t[order]).tolist()
        first = {segment: i for i, segment in reversed(list(enumerate(segments)))}
        missed = [i for segment, i in first.items() if num is not None and i >= num]
        return self.rows(torch.cat([order[:num], order[sorted(missed)]]))

    def spread(self, num: int, timeline: Timeline, seed: int) -> CalibrationSet:
        """Returns about `num` samples, drawn alike from every segment of a timeline: at least one
        of each that has any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segment = timeline.segments_of(self.t[order])
        each = max(1, num // timeline.num_segments)
        parts = [order[segment == s][:each] for s in range(timeline.num_segments)]
        return self.rows(torch.cat(parts))

    def thinned(self, num: int) -> CalibrationSet:
        """Returns at most `num` samples, evenly picked."""
        return self.rows(torch.linspace(0, len(self) - 1, min(len(self), num)).long().unique())

    def rows(self, rows: torch.Tensor | slice) -> CalibrationSet:
        """Returns the samples `rows` (indices)."""
        values = {name: getattr(self, name) for name in ("x", "t", "which", "trajectory")}
        return replace(self, **{k: v if v is None else v[rows] for k, v in values.items()})

    def stretches(self, length: int) -> torch.Tensor:
        """Returns the rows of every `length` successive samples of a trajectory, noisiest first,
        (M, length); of fewer if no trajectory has as many. Raises ValueError where it is not known
        which samples share one."""
        if self.trajectory is None:
            raise ValueError(
                "the calibration file does not say on which trajectory each sample lies; make it "
                "again with scripts/calibrate.py"
            )
        order = self.t.argsort(descending=True, stable=True)
        paths = [order[self.trajectory[order] == number] for number in self.trajectory.unique()]
        length = min(length, max(map(len, paths)))
        return torch.cat([rows.unfold(0, length, 1) for rows in paths if len(rows) >= length])

    def arguments(self, rows: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
        """Returns what the network is called with for the samples `rows` (a slice or indices): (x,
        t) or (x, t, cond)."""
        if self.cond is None:
            return self.x[rows], self.t[rows]
        return self.x[rows], self.t[rows], self.cond[self.which[rows]]

    def batches(self, size: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yields the arguments of `size` samples each in turn, the last of fewer."""
        return (self.arguments(slice(i, i + size)) for i in range(0, len(self), size))

    def save(self, path: Path | str) -> None:
        """Writes the set as safetensors."""
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        save_tensors(path, tensors, {"format": FORMAT, "made": self.made})


def twice(samples: CalibrationSet, null: torch.Tensor) -> CalibrationSet:
    """Returns every sample under its own condition and, again, under that of its row of `null`, as
    guidance wants it."""
    images = int(samples.trajectory.max()) + 1
    return replace(
        samples,
        x=samples.x.repeat(2, 1, 1, 1),
        t=samples.t.repeat(2),
        cond=torch.cat([samples.cond, null]),
        which=torch.arange(2 * len(null)),
        trajectory=torch.cat([samples.trajectory, samples.trajectory + images]),
    )


def pick(
    batches: Sequence[torch.Tensor],
    t: torch.Tensor,
    pairs: tuple[torch.Tensor, ...],
    *,
    cond: torch.Tensor | None = None,
    null: torch.Tensor | None = None,
    made: dict[str, Any],
) -> CalibrationSet:
    """Returns the set of the `pairs` that a builder chose from recorded trajectories.

    `batches` holds x (S + 1, B, C, H, W) for images 0 .. B-1, B .. 2B-1, ...: the inputs of the
    network, then the clean image in the end; t (S,) are the steps that the network was told. cond
    (K, ...) has a row for each image. With a `null` condition (1, ...), as guidance needs it, every
    sample occurs twice: with its own and with the null one."""
    step, image, *other_times = pairs
    size = batches[0].shape[1]
    places = zip(step.tolist(), image.tolist())
    x = torch.stack([batches[i // size][s, i % size] for s, i in places])
    t = other_times[0] if other_times else t[step].float()
    made = made | {"samples_per_step": step.bincount(minlength=len(batches[0]) - 1).tolist()}
    if cond is None:
        return CalibrationSet(x, t, trajectory=image, made=made)
    if null is None:
        # a file holds no tensor under two names
        return CalibrationSet(x, t, cond, image, image.clone(), made)
    which = torch.cat([image, torch.full_like(image, len(cond))])
    trajectory = torch.cat([image, len(cond) + image])
    conditions = torch.cat([cond, null])
    return CalibrationSet(x.repeat(2, 1, 1, 1), t.repeat(2), conditions, which, trajectory, made)

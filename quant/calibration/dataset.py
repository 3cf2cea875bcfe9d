"""Calibration sets: what the network sees on its way from noise to image, and how it was collected.

Axes: N samples, S evaluations of the network on a trajectory (step 0 is the first one, the
noisiest), B images of a recorded batch, K conditions, C channels, H x W pixels."""

from dataclasses import dataclass, field, replace

import torch

from base.files import save_tensors

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
    made: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def subset(self, num, timeline, seed):
        """`num` samples drawn without replacement (None, or if there are fewer: all), and one more
        of every segment of a timeline that these leave without any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segments = timeline.segments_of(self.t[order]).tolist()
        first = {segment: i for i, segment in reversed(list(enumerate(segments)))}
        missed = [i for segment, i in first.items() if num is not None and i >= num]
        return self.rows(torch.cat([order[:num], order[sorted(missed)]]))

    def spread(self, num, timeline, seed):
        """About `num` samples, drawn alike from every segment of a timeline: at least one of each
        that has any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segment = timeline.segments_of(self.t[order])
        each = max(1, num // timeline.num_segments)
        return self.rows(
            torch.cat([order[segment == s][:each] for s in range(timeline.num_segments)])
        )

    def thinned(self, num):
        """At most `num` samples, evenly picked."""
        return self.rows(torch.linspace(0, len(self) - 1, min(len(self), num)).long().unique())

    def rows(self, rows):
        """The samples `rows` (indices)."""
        return replace(
            self,
            **{
                name: value if value is None else value[rows]
                for name, value in (
                    ("x", self.x),
                    ("t", self.t),
                    ("which", self.which),
                    ("trajectory", self.trajectory),
                )
            },
        )

    def stretches(self, length):
        """Rows of every `length` successive samples of a trajectory, noisiest first, (M, length);
        of fewer if no trajectory has as many. Raises ValueError where it is not known which samples
        share one."""
        if self.trajectory is None:
            raise ValueError(
                "the calibration file does not say on which trajectory each sample lies; make it "
                "again "
                "with scripts/calibrate.py"
            )
        order = self.t.argsort(descending=True, stable=True)
        paths = [order[self.trajectory[order] == number] for number in self.trajectory.unique()]
        length = min(length, max(map(len, paths)))
        return torch.cat([rows.unfold(0, length, 1) for rows in paths if len(rows) >= length])

    def arguments(self, rows):
        """What the network is called with for the samples `rows` (a slice or indices): (x, t) or
        (x, t, cond)."""
        if self.cond is None:
            return self.x[rows], self.t[rows]
        return self.x[rows], self.t[rows], self.cond[self.which[rows]]

    def batches(self, size):
        """Arguments of `size` samples each in turn, the last of fewer."""
        return (self.arguments(slice(i, i + size)) for i in range(0, len(self), size))

    def save(self, path):
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        save_tensors(path, tensors, {"format": FORMAT, "made": self.made})


def twice(samples, null):
    """Every sample under its own condition and, again, under that of its row of `null`, as guidance
    wants it."""
    images = int(samples.trajectory.max()) + 1
    return replace(
        samples,
        x=samples.x.repeat(2, 1, 1, 1),
        t=samples.t.repeat(2),
        cond=torch.cat([samples.cond, null]),
        which=torch.arange(2 * len(null)),
        trajectory=torch.cat([samples.trajectory, samples.trajectory + images]),
    )


def pick(batches, t, pairs, *, cond=None, null=None, made):
    """The set of the `pairs` that a builder chose from recorded trajectories.

    `batches` holds x (S + 1, B, C, H, W) for images 0 .. B-1, B .. 2B-1, ...: the inputs of the
    network, then the clean image in the end; t (S,) are the steps that the network was told. cond
    (K, ...) has a row for each image. With a `null` condition (1, ...), as guidance needs it, every
    sample occurs twice: with its own and with the null one."""
    step, image, *told = pairs
    size = batches[0].shape[1]
    x = torch.stack(
        [batches[i // size][s, i % size] for s, i in zip(step.tolist(), image.tolist())]
    )
    t = told[0] if told else t[step].float()
    made = made | {"samples_per_step": step.bincount(minlength=len(batches[0]) - 1).tolist()}
    if cond is None:
        return CalibrationSet(x, t, trajectory=image, made=made)
    if null is None:
        # a file holds no tensor under two names
        return CalibrationSet(x, t, cond, image, image.clone(), made)
    which = torch.cat([image, torch.full_like(image, len(cond))])
    return CalibrationSet(
        x.repeat(2, 1, 1, 1),
        t.repeat(2),
        torch.cat([cond, null]),
        which,
        torch.cat([image, len(cond) + image]),
        made,
    )

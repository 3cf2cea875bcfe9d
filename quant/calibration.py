"""Calibration sets: what the network sees on its way from noise to image, and how it was collected.

Axes: N samples, S evaluations of the network on a trajectory (step 0 is the first one, the noisiest), B images of a
recorded batch, K conditions, C channels, H x W pixels.
"""
import inspect
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from quant.config import unknown_word
from quant.files import load_tensors, save_tensors
from quant.tdac import tdac

FORMAT = "tinydm-calibration/1"


@dataclass
class CalibrationSet:
    """x (N, C, H, W) float32 network inputs, t (N,) their steps, and how they were made. A conditional network's set
    also has `cond` (K, ...), the distinct conditions (contexts or class labels), and `which` (N,), the row of each
    sample: a text context is far larger than an image and the same at every step. `trajectory` (N,) numbers the
    trajectory that a sample lies on, where that is known."""
    x: torch.Tensor
    t: torch.Tensor
    cond: torch.Tensor | None = None
    which: torch.Tensor | None = None
    trajectory: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def subset(self, num, timeline, seed):
        """`num` samples drawn without replacement (None, or if there are fewer: all), and one more of every segment of
        a timeline that these leave without any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segments = timeline.segments_of(self.t[order]).tolist()
        first = {segment: i for i, segment in reversed(list(enumerate(segments)))}
        missed = [i for segment, i in first.items() if num is not None and i >= num]
        return self.rows(torch.cat([order[:num], order[sorted(missed)]]))

    def spread(self, num, timeline, seed):
        """About `num` samples, drawn alike from every segment of a timeline: at least one of each that has any."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        segment = timeline.segments_of(self.t[order])
        each = max(1, num // timeline.num_segments)
        return self.rows(torch.cat([order[segment == s][:each] for s in range(timeline.num_segments)]))

    def thinned(self, num):
        """At most `num` samples, evenly picked."""
        return self.rows(torch.linspace(0, len(self) - 1, min(len(self), num)).long().unique())

    def rows(self, rows):
        """The samples `rows` (indices)."""
        return replace(self, **{name: value if value is None else value[rows] for name, value in
                                (("x", self.x), ("t", self.t), ("which", self.which), ("trajectory", self.trajectory))})

    def stretches(self, length):
        """Rows of every `length` successive samples of a trajectory, noisiest first, (M, length); of fewer if no
        trajectory has as many. Raises ValueError where it is not known which samples share one."""
        if self.trajectory is None:
            raise ValueError("the calibration file does not say on which trajectory each sample lies; make it again "
                             "with scripts/calibrate.py")
        order = self.t.argsort(descending=True, stable=True)
        paths = [order[self.trajectory[order] == number] for number in self.trajectory.unique()]
        length = min(length, max(map(len, paths)))
        return torch.cat([rows.unfold(0, length, 1) for rows in paths if len(rows) >= length])

    def arguments(self, rows):
        """What the network is called with for the samples `rows` (a slice or indices): (x, t) or (x, t, cond)."""
        if self.cond is None:
            return self.x[rows], self.t[rows]
        return self.x[rows], self.t[rows], self.cond[self.which[rows]]

    def batches(self, size):
        """Arguments of `size` samples each in turn, the last of fewer."""
        return (self.arguments(slice(i, i + size)) for i in range(0, len(self), size))

    def save(self, path):
        tensors = {name: value for name, value in vars(self).items() if torch.is_tensor(value)}
        save_tensors(path, tensors, {"format": FORMAT, "made": self.made})


def load_calibration(path):
    """Read our safetensors file or the ecosystem's torch file {"xs", "ts"[, "cs"[, "ucs"]]}. Raises ValueError if it is
    neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration file {path} does not exist; scripts/calibrate.py makes it")
    if path.suffix == ".safetensors":
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path} is not a calibration file (format '{meta.get('format')}', expected '{FORMAT}')")
        return CalibrationSet(**tensors, made=meta["made"])
    return _ecosystem_set(path)


def _ecosystem_set(path):
    """Q-Diffusion's layout: xs and ts are lists over sampling steps of (samples, ...) tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                           # noqa: BLE001 (any unpickling failure is the same news)
        raise ValueError(f"{path} is not a readable torch file of plain tensors ({type(error).__name__}); nothing in "
                         "it was run") from None
    if not isinstance(content, dict) or not {"xs", "ts"} <= content.keys():
        raise ValueError(f"{path} must hold a dict with 'xs' and 'ts' (lists over sampling steps)")
    xs, ts, cs, ucs = (_entries(path, key, content[key]) if key in content else [] for key in ("xs", "ts", "cs", "ucs"))
    if not xs or xs[0].dim() != 4:
        raise ValueError(f"{path} must hold images (samples, channels, height, width) in every entry of 'xs'; found "
                         f"{tuple(xs[0].shape) if xs else 'no entry'}")
    if len(xs) != len(ts):
        raise ValueError(f"{path} has {len(xs)} steps in 'xs' and {len(ts)} in 'ts'")
    t = [step.reshape(-1).expand(len(x)) if step.numel() == 1 else step for x, step in zip(xs, ts)]
    for x, steps in zip(xs, t):
        if len(x) != len(steps):
            raise ValueError(f"{path} has {len(x)} samples in an entry of 'xs' and {len(steps)} steps in that of 'ts'")
    cond = which = None
    if cs:
        cond = torch.cat(cs)
        which = torch.arange(len(cond))
        if len(cond) != sum(map(len, xs)):
            raise ValueError(f"{path} has {len(cond)} conditions in 'cs' and {sum(map(len, xs))} samples in 'xs'")
    made = {"file": path.name, "steps": len(xs)}
    trajectory = torch.cat([torch.arange(len(x)) for x in xs])
    found = CalibrationSet(torch.cat(xs).float(), torch.cat(t).float(), cond, which, trajectory, made)
    if not ucs:
        return found
    null = torch.cat(ucs)
    if cond is None or len(null) != len(cond):
        raise ValueError(f"{path} has {len(null)} conditions in 'ucs', which needs as many in 'cs'; found "
                         f"{0 if cond is None else len(cond)}")
    return twice(found, null)


def _entries(path, key, value):
    """A list of the ecosystem's file: tensors that differ in the number of samples alone; times may be single ones."""
    try:
        entries = [torch.as_tensor(entry) for entry in value]
        if entries and key != "ts":
            torch.cat(entries)
        return entries
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{path} must hold a list over sampling steps in '{key}', of tensors that differ in their "
                         "number of samples alone") from None


def twice(samples, null):
    """Every sample under its own condition and, again, under that of its row of `null`, as guidance wants it."""
    images = int(samples.trajectory.max()) + 1
    return replace(samples, x=samples.x.repeat(2, 1, 1, 1), t=samples.t.repeat(2), cond=torch.cat([samples.cond, null]),
                   which=torch.arange(2 * len(null)),
                   trajectory=torch.cat([samples.trajectory, samples.trajectory + images]))


def pick(batches, t, pairs, *, cond=None, null=None, made):
    """The set of the `pairs` that a builder chose from recorded trajectories.

    `batches` holds x (S + 1, B, C, H, W) for images 0 .. B-1, B .. 2B-1, ...: the inputs of the network, then the clean
    image in the end; t (S,) are the steps that the network was told. cond (K, ...) has a row for each image. With a
    `null` condition (1, ...), as guidance needs it, every sample occurs twice: with its own and with the null one.
    """
    step, image, *told = pairs
    size = batches[0].shape[1]
    x = torch.stack([batches[i // size][s, i % size] for s, i in zip(step.tolist(), image.tolist())])
    t = told[0] if told else t[step].float()
    made = made | {"samples_per_step": step.bincount(minlength=len(batches[0]) - 1).tolist()}
    if cond is None:
        return CalibrationSet(x, t, trajectory=image, made=made)
    if null is None:
        return CalibrationSet(x, t, cond, image, image.clone(), made)      # a file holds no tensor under two names
    which = torch.cat([image, torch.full_like(image, len(cond))])
    return CalibrationSet(x.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([cond, null]), which,
                          torch.cat([image, len(cond) + image]), made)


# ---- builders: (num_steps S, num_images, num_samples N, rng, features, **options) -> step (N,), image (N,), int64.
# `rng` is a torch.Generator; `features()` is what quant.tdac.middle_features gives. A builder that takes one step for
# each sample takes the images in turn.

def uniform(num_steps, num_images, num_samples, rng, features):
    """Q-Diffusion's set (arXiv:2302.04304): N / images evenly spaced steps (every so many-th where that divides S), the
    same images at each. Raises ValueError if there are fewer steps."""
    asked = steps_asked(num_steps, num_images, num_samples)
    return at_each(torch.arange(asked) * num_steps // asked, num_images)


def quad(num_steps, num_images, num_samples, rng, features):
    """As `uniform`, but denser towards the image, as the quad sequence of DDIM (Song et al. 2021, D.3): its i-th step
    from the image end is (i / (N / images - 1))^2 (S - 1), or i where that is more, so that no step occurs twice."""
    asked = steps_asked(num_steps, num_images, num_samples)
    place = torch.linspace(0, (num_steps - 1) ** 0.5, asked, dtype=torch.float64).square().round().long()
    return at_each(num_steps - 1 - place.maximum(torch.arange(asked)).flip(0), num_images)


def steps_asked(num_steps, num_images, num_samples):
    """N / images, the number of steps that all images are used at. Raises ValueError if there are fewer."""
    asked = num_samples // num_images
    if not 1 <= asked <= num_steps:
        raise ValueError(f"{asked} calibration steps asked for, the trajectory has {num_steps}; set calibration.steps "
                         f"to 1 to {num_steps}")
    return asked


def segments(num_steps, num_images, num_samples, rng, features, *, first=0.0, last=1.0, stride=2):
    """The multi-model set (repository yeefei13/T-diffusion): every `stride`-th step between the fractions `first` and
    `last` of the S steps (0 is the noisy end), the same images at each; at most N samples. Raises ValueError if that
    leaves nothing."""
    steps = torch.arange(num_steps)[round(first * num_steps):round(last * num_steps):stride]
    if not 1 <= len(steps) <= num_samples:
        raise ValueError(f"a segment from {first} to {last} with stride {stride} has {len(steps)} of {num_steps} steps "
                         f"for {num_samples} samples; widen it or change the stride")
    return at_each(steps, min(num_images, num_samples // len(steps)))


def random(num_steps, num_images, num_samples, rng, features):
    """Every step equally likely."""
    return torch.randint(num_steps, (num_samples,), generator=rng), in_turn(num_samples, num_images)


def linspace(num_steps, num_images, num_samples, rng, features):
    """Uniform steps of I2N and DI2N (repository iszry/HKU_2023_Summer_Research): N points evenly spaced over the chain,
    both ends included, shuffled."""
    place = torch.arange(num_samples, dtype=torch.float64) * (num_steps - 1) / max(num_samples - 1, 1)
    step = num_steps - 1 - place.round().long()
    return step[torch.randperm(num_samples, generator=rng)], in_turn(num_samples, num_images)


def normal(num_steps, num_images, num_samples, rng, features, *, mean=0.4, std=0.4, resample=False, pairing="correct"):
    """Normally distributed time steps (PTQ4DM, Shang et al. 2023, arXiv:2211.15736, Algorithm 1):

        i = clip(floor(n), 0, S - 1),  n ~ Normal(mean S, std S),  i the place in the chain from the image end

    What falls off the ends is clipped to them, or with `resample` drawn again.

    `pairing: legacy` is the released code's mistake: the number drawn counts iterations from the noisy end, the sample
    is the state after that iteration, and the network is told that count instead of a step of the schedule.
    """
    if std <= 0 or pairing not in ("correct", "legacy"):
        raise ValueError(f"builder 'normal' has std {std} and pairing '{pairing}'; it takes a std above 0 and pairing "
                         "correct or legacy")
    ends = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / std
    low, high = torch.special.ndtr(ends).tolist() if resample else (0, 1)
    place = chain_index(mean + std * between_quantiles(low, high, num_samples, rng), num_steps)
    image = in_turn(num_samples, num_images)
    return (num_steps - 1 - place, image) if pairing == "correct" else (place + 1, image, place.float())


def half_normal(num_steps, num_images, num_samples, rng, features, *, std=0.3):
    """|Normal(0, std)| as a fraction of the chain from the image end, clipped to the noisy end
    (iszry/HKU_2023_Summer_Research)."""
    place = chain_index(std * between_quantiles(0.5, 1, num_samples, rng), num_steps)
    return num_steps - 1 - place, in_turn(num_samples, num_images)


def between_quantiles(low, high, num, rng):
    """`num` standard normal values between two of its quantiles."""
    return torch.special.ndtri(low + (high - low) * torch.rand(num, generator=rng, dtype=torch.float64))


def chain_index(fraction, num_steps):
    return (fraction * num_steps).floor().clamp(0, num_steps - 1).long()


def at_each(steps, num_images):
    """All pairs of `steps` and the first images, where the image runs fastest."""
    return steps.repeat_interleave(num_images), torch.arange(num_images).repeat(len(steps))


def in_turn(num_samples, num_images):
    return torch.arange(num_samples) % num_images


BUILDERS = {"uniform": uniform, "quad": quad, "segments": segments, "random": random, "linspace": linspace,
            "normal": normal, "half_normal": half_normal, "tdac": tdac}


def check_builder(name, options):
    """Raises ValueError for an unknown builder or option."""
    if name not in BUILDERS:
        raise ValueError(unknown_word(f"calibration builder '{name}' is unknown", name, BUILDERS))
    parameters = inspect.signature(BUILDERS[name]).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY] or ["none"]
    for key in options:
        if key not in known:
            raise ValueError(unknown_word(f"calibration builder '{name}' has no option '{key}'", key, known))

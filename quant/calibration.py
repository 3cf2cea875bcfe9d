"""Calibration sets: what the network sees on its way from noise to image, and how it was collected."""
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from quant.files import load_tensors, save_tensors

FORMAT = "tinydm-calibration/1"


@dataclass
class CalibrationSet:
    """x (N, C, H, W) float32 network inputs, t (N,) their steps, and how they were made. A conditional network's set
    also has `cond` (K, ...), the distinct conditions (contexts or class labels), and `which` (N,), the row of each
    sample: a text context is far larger than an image and the same at every step."""
    x: torch.Tensor
    t: torch.Tensor
    cond: torch.Tensor | None = None
    which: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def subset(self, num, seed):
        """`num` samples drawn without replacement (all if there are fewer)."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:num]
        which = None if self.which is None else self.which[rows]
        return CalibrationSet(self.x[rows], self.t[rows], self.cond, which, self.made)

    def arguments(self, rows):
        """What the network is called with for the samples `rows` (a slice or indices): (x, t) or (x, t, cond)."""
        if self.cond is None:
            return self.x[rows], self.t[rows]
        return self.x[rows], self.t[rows], self.cond[self.which[rows]]

    def batches(self, size):
        """Arguments of `size` samples each, the last tuple of fewer."""
        return [self.arguments(slice(i, i + size)) for i in range(0, len(self), size)]

    def save(self, path):
        tensors = {"x": self.x, "t": self.t} | ({} if self.cond is None else {"cond": self.cond, "which": self.which})
        save_tensors(path, tensors, {"format": FORMAT, "made": self.made})


def load_calibration(path):
    """Read our safetensors file or the ecosystem's torch file {"xs", "ts"[, "cs"]}. Raises ValueError if it is
    neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration file {path} does not exist; scripts/calibrate.py makes it")
    if path.suffix == ".safetensors":
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            raise ValueError(f"{path} is not a calibration file (format '{meta.get('format')}', expected '{FORMAT}')")
        return CalibrationSet(tensors["x"], tensors["t"], tensors.get("cond"), tensors.get("which"), meta["made"])
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
    xs, ts = ([torch.as_tensor(step) for step in content[key]] for key in ("xs", "ts"))
    if len(xs) != len(ts):
        raise ValueError(f"{path} has {len(xs)} steps in 'xs' and {len(ts)} in 'ts'")
    t = [step.reshape(-1).expand(len(x)) if step.numel() == 1 else step for x, step in zip(xs, ts)]
    for x, steps in zip(xs, t):
        if len(x) != len(steps):
            raise ValueError(f"{path} has {len(x)} samples in an entry of 'xs' and {len(steps)} steps in that of 'ts'")
    cond = which = None
    if "cs" in content:
        cond = torch.cat([torch.as_tensor(c) for c in content["cs"]])
        which = torch.arange(len(cond))
        if len(cond) != sum(map(len, xs)):
            raise ValueError(f"{path} has {len(cond)} conditions in 'cs' and {sum(map(len, xs))} samples in 'xs'")
    made = {"file": path.name, "steps": len(xs)}
    return CalibrationSet(torch.cat(xs).float(), torch.cat(t).float(), cond, which, made)


def uniform(record, num_steps, num_images, made):
    """Q-Diffusion's set: `num_steps` evenly spaced steps of the sampler's S (every (S / num_steps)-th where that
    divides), the same images at each.

    `record` is a list over sampling steps, noisiest first, of (x (N, C, H, W), t). Raises ValueError if it is short.
    """
    if not 1 <= num_steps <= len(record):
        raise ValueError(f"{num_steps} calibration steps asked for, the sampler has {len(record)}")
    picked = [record[i * len(record) // num_steps] for i in range(num_steps)]
    x = torch.cat([x[:num_images] for x, _ in picked])
    t = torch.cat([torch.full((min(num_images, len(x)),), float(t)) for x, t in picked])
    return CalibrationSet(x, t, made=made)


def with_condition(calibration, cond, null=None):
    """The set with condition cond[i] (images, ...) for image i, where the image runs fastest along the samples. With
    a `null` condition (1, ...), as guidance needs it, every sample occurs twice: with its own and with the null one."""
    which = torch.arange(len(calibration)) % len(cond)
    if null is None:
        return replace(calibration, cond=cond, which=which)
    return CalibrationSet(calibration.x.repeat(2, 1, 1, 1), calibration.t.repeat(2), torch.cat([cond, null]),
                          torch.cat([which, torch.full_like(which, len(cond))]), calibration.made)


BUILDERS = {"uniform": uniform}

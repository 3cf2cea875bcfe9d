"""Calibration sets: what the network sees on its way from noise to image, and how it was collected."""
from dataclasses import dataclass, field
from pathlib import Path

import torch

from quant.files import load_tensors, save_tensors

FORMAT = "tinydm-calibration/1"


@dataclass
class CalibrationSet:
    """x (N, C, H, W) float32 network inputs, t (N,) their steps, cond (N, ...) or None, and how they were made."""
    x: torch.Tensor
    t: torch.Tensor
    cond: torch.Tensor | None = None
    made: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.x)

    def subset(self, num, seed):
        """`num` samples drawn without replacement (all if there are fewer)."""
        rows = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))[:num]
        return CalibrationSet(self.x[rows], self.t[rows], None if self.cond is None else self.cond[rows], self.made)

    def batches(self, size):
        """(x, t) tuples of `size` samples, the last one smaller."""
        return list(zip(self.x.split(size), self.t.split(size)))

    def save(self, path):
        tensors = {"x": self.x, "t": self.t} | ({} if self.cond is None else {"cond": self.cond})
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
        return CalibrationSet(tensors["x"], tensors["t"], tensors.get("cond"), meta["made"])
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
    cond = torch.cat([torch.as_tensor(c) for c in content["cs"]]) if "cs" in content else None
    return CalibrationSet(torch.cat(xs).float(), torch.cat(t).float(), cond, {"file": path.name, "steps": len(xs)})


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
    return CalibrationSet(x, t, None, made)


BUILDERS = {"uniform": uniform}

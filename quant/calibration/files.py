"""Files of calibration sets: our safetensors, and the torch files of the ecosystem."""

from pathlib import Path

import torch

from base.files import load_tensors
from quant.calibration.dataset import FORMAT, CalibrationSet, twice


def load_calibration(path: Path | str) -> CalibrationSet:
    """Reads our safetensors file or the ecosystem's torch file {"xs", "ts"[, "cs"[, "ucs"]]}.
    Raises ValueError if it is neither."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"calibration file {path} does not exist; scripts/calibrate.py makes it")
    if path.suffix == ".safetensors":
        tensors, meta = load_tensors(path)
        if meta.get("format") != FORMAT:
            found = f"format '{meta.get('format')}', expected '{FORMAT}'"
            raise ValueError(f"{path} is not a calibration file ({found})")
        return CalibrationSet(**tensors, made=meta["made"])
    return _ecosystem_set(path)


def _ecosystem_set(path):
    """Q-Diffusion's layout: xs and ts are lists over sampling steps of (samples, ...) tensors."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (any unpickling failure is the same news)
        raise ValueError(
            f"{path} is not a readable torch file of plain tensors ({type(error).__name__}); "
            "nothing in it was run"
        ) from None
    if not isinstance(content, dict) or not {"xs", "ts"} <= content.keys():
        raise ValueError(f"{path} must hold a dict with 'xs' and 'ts' (lists over sampling steps)")
    names = ("xs", "ts", "cs", "ucs")
    xs, ts, cs, ucs = (_entries(path, name, content.get(name, [])) for name in names)
    if not xs or xs[0].dim() != 4:
        raise ValueError(
            f"{path} must hold images (samples, channels, height, width) in every entry of 'xs'; "
            f"found {tuple(xs[0].shape) if xs else 'no entry'}"
        )
    if len(xs) != len(ts):
        raise ValueError(f"{path} has {len(xs)} steps in 'xs' and {len(ts)} in 'ts'")
    t = [step.reshape(-1).expand(len(x)) if step.numel() == 1 else step for x, step in zip(xs, ts)]
    for x, steps in zip(xs, t):
        if len(x) != len(steps):
            raise ValueError(
                f"{path} has {len(x)} samples in an entry of 'xs' and {len(steps)} steps in "
                "that of 'ts'"
            )
    x, cond, which = torch.cat(xs).float(), None, None
    if cs:
        cond = torch.cat(cs)
        which = torch.arange(len(cond))
        if len(cond) != len(x):
            raise ValueError(
                f"{path} has {len(cond)} conditions in 'cs' and {len(x)} samples in 'xs'"
            )
    made = {"file": path.name, "steps": len(xs)}
    trajectory = torch.cat([torch.arange(len(entry)) for entry in xs])
    found = CalibrationSet(x, torch.cat(t).float(), cond, which, trajectory, made)
    if not ucs:
        return found
    null = torch.cat(ucs)
    count = sum(map(len, cs))
    if not cs or len(null) != count:
        raise ValueError(
            f"{path} has {len(null)} conditions in 'ucs', which needs as many in 'cs'; found "
            f"{count}"
        )
    return twice(found, null)


def _entries(path, key, value):
    """A list of the ecosystem's file: tensors that differ in the number of samples alone; times may
    be single ones."""
    try:
        entries = [torch.as_tensor(entry) for entry in value]
        if entries and key != "ts":
            torch.cat(entries)
        return entries
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"{path} must hold a list over sampling steps in '{key}', of tensors that differ in "
            "their number of samples alone"
        ) from None

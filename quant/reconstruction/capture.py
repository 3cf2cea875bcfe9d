"""Inputs and outputs of every reconstruction unit over a calibration set, by streaming from unit to
unit.

A stream holds the activations of one network at the graph cut of the current unit: the outputs of
finished units that something later still reads. To reach the inputs of the next unit the network's
own forward is replayed with finished units answering from the stream, so only the glue between
units (concatenations, padding) is computed again and the whole walk costs one forward pass per
network, O(L) instead of O(L^2)."""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.hooks import watching
from quant.calibration.dataset import CalibrationSet
from quant.network import QuantizedNet, modules_of


class Store:
    """Tensors in memory up to `memory_gb`, beyond that in unlinked files under `folder`, mapped
    into memory."""

    def __init__(self, memory_gb: float, folder: Path):
        self.budget, self.folder = int(memory_gb * 2**30), Path(folder)
        self.used = self.peak = self.spilled = 0
        self.sizes = {}

    def empty(self, shape: Iterable[int]) -> torch.Tensor:
        """Returns an uninitialised float32 tensor. Raises OSError when the disk is full."""
        count = int(torch.Size(shape).numel())
        if self.used + 4 * count <= self.budget:
            tensor = torch.empty(shape)
            self.sizes[id(tensor)] = 4 * count
            self.used += 4 * count
            self.peak = max(self.peak, self.used)
            return tensor
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, path = tempfile.mkstemp(dir=self.folder, suffix=".spill")
        try:
            os.posix_fallocate(handle, 0, 4 * count)  # no crash later on, when the disk is full
            tensor = torch.from_file(path, shared=True, size=count, dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            os.unlink(path)  # the mapping keeps the space until it is dropped
        self.spilled += 4 * count
        return tensor

    def free(self, tensor: torch.Tensor) -> None:
        """Takes a tensor off the account."""
        self.used -= self.sizes.pop(id(tensor), 0)


class Conditions:
    """The condition of every sample of a calibration set, read like a tensor (N, ...) by rows."""

    def __init__(self, calibration: CalibrationSet):
        self.calibration = calibration

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        return self.calibration.arguments(rows)[2]


class _Reached(Exception):
    """Carries the arguments of the unit that a replay was looking for."""


@contextmanager
def answering(
    modules: Mapping[str, nn.Module], answers: Mapping[str, Callable[..., torch.Tensor]]
) -> Iterator[None]:
    """While inside, modules[name](...) calls answers[name](...) instead of computing."""
    try:
        for name, answer in answers.items():
            modules[name].forward = answer
        yield
    finally:
        for name in answers:
            modules[name].__dict__.pop("forward", None)


class Stream:
    """One network's activations over a calibration set. `advance` units in order; `inputs` looks
    one unit ahead."""

    def __init__(
        self,
        net: nn.Module,
        units: list[str],
        last_use: Mapping[str, int],
        calibration: CalibrationSet,
        *,
        batch_size: int,
        store: Store,
    ):
        self.net, self.modules, self.units, self.last_use = net, modules_of(net), units, last_use
        self.calibration, self.store = calibration, store
        self.device, count = next(net.parameters()).device, len(calibration)
        self.rows = [slice(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
        self.outputs, self.shapes = {}, {}

    def _recall(self, name, rows):
        def answer(*_):
            if name in self.outputs:
                return self.outputs[name][rows].to(self.device)
            # nobody reads it any more: the right shape without memory
            shape = rows.stop - rows.start, *self.shapes[name]
            return torch.zeros((), device=self.device).expand(shape)

        return answer

    @torch.no_grad()
    def inputs(self, unit: str) -> list[Any]:
        """Returns the arguments of `unit` over the whole set, tensors (N, ...) or Conditions; give
        them back with `free`."""
        gathered = None
        for rows in self.rows:
            batch = [a.to(self.device) for a in self.calibration.arguments(rows)]
            arguments = self._reach(unit, rows, batch)
            gathered = gathered or [self._room(a, batch) for a in arguments]
            for whole, a in zip(gathered, arguments):
                if not isinstance(whole, Conditions):
                    whole[rows] = a
        return gathered

    def _room(self, a, batch):
        """For an argument over all samples. The condition reaches units as it is: it stays in the
        calibration set, one row for many samples."""
        return Conditions(self.calibration) if any(a is c for c in batch[2:]) else self._whole(a)

    def _reach(self, unit, rows, batch):
        """What the unit is called with when the network runs on the batch of these rows."""

        def stop(*arguments):
            raise _Reached(arguments)

        answers = {name: self._recall(name, rows) for name in self.shapes} | {unit: stop}
        try:
            with answering(self.modules, answers):
                self.net(*batch)
        except _Reached as reached:
            return reached.args[0]
        raise RuntimeError(f"the network never calls {unit}")

    def _whole(self, part):
        return self.store.empty((len(self.calibration), *part.shape[1:]))

    @torch.no_grad()
    def advance(self, unit: str, inputs: list[Any]) -> torch.Tensor:
        """Runs `unit` on its inputs, keeps the output (N, ...), drops what nobody reads any more;
        returns the output."""
        whole = None
        for rows in self.rows:
            if isinstance(self.net, QuantizedNet):
                self.net.timeline.set_time(self.calibration.t[rows].to(self.device))
            out = self.modules[unit](*(a[rows].to(self.device) for a in inputs))
            whole = self._whole(out) if whole is None else whole
            whole[rows] = out
        self.outputs[unit], self.shapes[unit] = whole, whole.shape[1:]
        return whole

    def drop_dead(self, unit: str) -> None:
        """Frees the outputs that no unit after `unit` reads."""
        done = self.units.index(unit)
        for name in [n for n in self.outputs if self.last_use[n] <= done]:
            self.free([self.outputs.pop(name)])

    def free(self, tensors: Iterable[Any]) -> None:
        """Gives back what `inputs` returned."""
        for tensor in tensors:
            self.store.free(tensor)


@torch.no_grad()
def inputs_of(
    net: nn.Module,
    names: Iterable[str],
    calibration: CalibrationSet,
    batch_size: int,
    *,
    whole: bool = False,
) -> dict[str, Any]:
    """Returns the inputs of the modules `names` over a calibration set -> {name: tensor (N, ...)};
    with `whole` a tuple of all their arguments."""
    found, device = {name: [] for name in names}, next(net.parameters()).device

    def note(name, _, inputs):
        found[name].append(inputs)

    with watching(net, {name: partial(note, name) for name in found}, before=True):
        for arguments in calibration.batches(batch_size):
            net(*(a.to(device) for a in arguments))
    joined = {name: tuple(map(torch.cat, zip(*calls))) for name, calls in found.items()}
    return joined if whole else {name: inputs[0] for name, inputs in joined.items()}

"""Inputs and outputs of every reconstruction unit over a calibration set, by streaming from unit to
unit.

A stream holds the activations of one network at the graph cut of the current unit: the outputs of
finished units that something later still reads. To reach the inputs of the next unit the network's
own forward is replayed with finished units answering from the stream, so only the glue between
units (concatenations, padding) is computed again and the whole walk costs one forward pass per
network, O(L) instead of O(L^2)."""

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch

from quant.network import QuantizedNet, modules_of


class Store:
    """Tensors in memory up to `memory_gb`, beyond that in unlinked files under `folder`, mapped
    into memory."""

    def __init__(self, memory_gb, folder):
        self.budget, self.folder = int(memory_gb * 2**30), Path(folder)
        self.used = self.peak = self.spilled = 0
        self.sizes = {}

    def empty(self, shape):
        """An uninitialised float32 tensor. Raises OSError when the disk is full."""
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
            # a full disk is an error here, not a crash on first touch
            os.posix_fallocate(handle, 0, 4 * count)
            tensor = torch.from_file(path, shared=True, size=count, dtype=torch.float32).view(shape)
        finally:
            os.close(handle)
            # the mapping keeps the space until it is dropped
            os.unlink(path)
        self.spilled += 4 * count
        return tensor

    def free(self, tensor):
        self.used -= self.sizes.pop(id(tensor), 0)


class Conditions:
    """The condition of every sample of a calibration set, read like a tensor (N, ...) by rows."""

    def __init__(self, calibration):
        self.calibration = calibration

    def __getitem__(self, rows):
        return self.calibration.arguments(rows)[2]


class _Reached(Exception):
    """Carries the arguments of the unit that a replay was looking for."""


@contextmanager
def answering(modules, answers):
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

    def __init__(self, net, units, last_use, calibration, *, batch_size, store):
        self.net, self.modules, self.units, self.last_use = (net, modules_of(net), units, last_use)
        self.calibration, self.store, self.device = (
            calibration,
            store,
            next(net.parameters()).device,
        )
        self.rows = [
            slice(i, min(i + batch_size, len(calibration)))
            for i in range(0, len(calibration), batch_size)
        ]
        self.outputs, self.shapes = {}, {}

    def _recall(self, name, rows):
        def answer(*_):
            if name in self.outputs:
                return self.outputs[name][rows].to(self.device)
            # Nobody reads it any more: the right shape without memory.
            return torch.zeros((), device=self.device).expand(
                rows.stop - rows.start, *self.shapes[name]
            )

        return answer

    @torch.no_grad()
    def inputs(self, unit):
        """Arguments of `unit` over the whole set: a list of tensors (N, ...) (or Conditions); give
        them back with `free`."""

        def stop(*arguments):
            raise _Reached(arguments)

        gathered = None
        for rows in self.rows:
            answers = {name: self._recall(name, rows) for name in self.shapes} | {unit: stop}
            with answering(self.modules, answers):
                batch = [a.to(self.device) for a in self.calibration.arguments(rows)]
                try:
                    self.net(*batch)
                    raise RuntimeError(f"the network never calls {unit}")
                except _Reached as reached:
                    arguments = reached.args[0]
            # The condition reaches units as it is: it stays in the calibration set, one row for
            # many samples.
            given = [len(batch) == 3 and a is batch[2] for a in arguments]
            gathered = gathered or [
                Conditions(self.calibration)
                if is_condition
                else self.store.empty((len(self.calibration), *a.shape[1:]))
                for a, is_condition in zip(arguments, given)
            ]
            for whole, a, is_condition in zip(gathered, arguments, given):
                if not is_condition:
                    whole[rows] = a
        return gathered

    @torch.no_grad()
    def advance(self, unit, inputs):
        """Run `unit` on its inputs, keep the output (N, ...), drop what nobody reads any more;
        returns the output."""
        whole = None
        for rows in self.rows:
            if isinstance(self.net, QuantizedNet):
                self.net.timeline.set_time(self.calibration.t[rows])
            out = self.modules[unit](*(a[rows].to(self.device) for a in inputs))
            whole = (
                self.store.empty((len(self.calibration), *out.shape[1:]))
                if whole is None
                else whole
            )
            whole[rows] = out
        self.outputs[unit], self.shapes[unit] = whole, whole.shape[1:]
        return whole

    def drop_dead(self, unit):
        """Free the outputs that no unit after `unit` reads."""
        done = self.units.index(unit)
        for name in [n for n in self.outputs if self.last_use[n] <= done]:
            self.free([self.outputs.pop(name)])

    def free(self, tensors):
        for tensor in tensors:
            self.store.free(tensor)


@torch.no_grad()
def inputs_of(net, names, calibration, batch_size, *, whole=False):
    """Inputs of the modules `names` over a calibration set -> {name: tensor (N, ...)}; with `whole`
    a tuple of all their arguments."""
    found, device = {name: [] for name in names}, next(net.parameters()).device
    hooks = [
        net.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: found[name].append(inputs)
        )
        for name in names
    ]
    try:
        for arguments in calibration.batches(batch_size):
            net(*(a.to(device) for a in arguments))
    finally:
        for hook in hooks:
            hook.remove()
    joined = {
        name: tuple(torch.cat(parts) for parts in zip(*calls)) for name, calls in found.items()
    }
    return joined if whole else {name: inputs[0] for name, inputs in joined.items()}

"""A GPU that is played: tensors that say they lie on "lazy", which PyTorch takes for a device like
any other, and are computed on the CPU, so that they have values. It complains of what a GPU would
complain of, and notes what would make a program wait for one."""

import sys
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from base.files import PROJECT

CPU, DEVICE = torch.device("cpu"), torch.device("lazy")  # backward passes need no thread for it
COPIES = {"_to_copy", "copy_"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # indices are brought over
# whose result, or its size, depends on values
READS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}


class Played(torch.Tensor):
    """A tensor on the device; its values lie in `held`."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        layout |= {"dtype": held.dtype, "device": DEVICE}
        tensor = torch.Tensor._make_wrapper_subclass(cls, held.shape, **layout)
        tensor.held = held
        return tensor

    def __repr__(self):
        return f"Played({self.held})"

    def tolist(self):
        return self.to(CPU).tolist()

    def untyped_storage(self):
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} ran outside of `with PlayedDevice()`")


class PlayedDevice(TorchDispatchMode):
    """While inside, the device is there. `made`, `moved` and `read` count what was made on the CPU
    from nothing, copied from one device to the other, and waited for, by "FILE: FUNCTION" of the
    library."""

    def __init__(self):
        super().__init__()
        self.forget()

    def forget(self):
        """Count from now on."""
        self.made, self.moved, self.read = Counter(), Counter(), Counter()

    def __enter__(self):
        # else torch.tensor(numbers, device=...) brings them over behind the back of this mode
        self.before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self.before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, given = kwargs or {}, []

        def bare(value):
            if not isinstance(value, torch.Tensor):
                return value
            given.append(value)
            return value.held if isinstance(value, Played) else value

        bare_args, bare_kwargs = _each(bare, args), _each(bare, kwargs)
        played, name = [t for t in given if isinstance(t, Played)], function.overloadpacket.__name__
        there = bool(played)
        if kwargs.get("device") is not None:
            there = torch.device(kwargs["device"]).type == DEVICE.type
            bare_kwargs["device"] = CPU
        elif name == "copy_":
            there = isinstance(args[0], Played)
        self._complain(function, name, given, played)
        self._note(name, given, played, there)
        out = function(*bare_args, **bare_kwargs)
        if not there:
            return args[0] if name == "copy_" else out
        known = {id(t.held): t for t in played}  # in-place functions return what they were given

        def wrap(value):
            return known.get(id(value), value) if id(value) in known else _wrapped(value)

        out = _each(wrap, out)
        return return_and_correct_aliasing(function, args, kwargs, out) if played else out

    def _complain(self, function, name, given, played):
        """As a GPU would; numbers (tensors of no axes) may lie elsewhere."""
        mixed = any(t.dim() for t in played) and any(
            t.dim() for t in given if not isinstance(t, Played)
        )
        if mixed and name not in COPIES | INDEXING:
            raise RuntimeError(f"{function}: tensors lie on the CPU and on the device")

    def _note(self, name, given, played, there):
        if played and name in READS:
            self.read[_caller()] += 1
        elif name in COPIES and (len(played) < len(given) or not there) and (played or there):
            self.moved[_caller()] += 1
        elif name in INDEXING and 0 < len(played) < len(given):
            self.moved[_caller()] += 1
        elif not there and not given:
            self.made[_caller()] += 1


def _each(change, value):
    """value with `change` made to what its lists, tuples and dicts hold."""
    if isinstance(value, dict):
        return {key: _each(change, inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, inner) for inner in value])
    return change(value)


def _wrapped(value):
    return Played(value) if isinstance(value, torch.Tensor) else value


def _caller():
    """The innermost function of the library that runs."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        ours = path.startswith(str(PROJECT)) and "/site-packages/" not in path  # of its .venv
        if ours and "/tests/" not in path:
            return f"{path.removeprefix(f'{PROJECT}/')}: {frame.f_code.co_name}"
        frame = frame.f_back
    return "a test"

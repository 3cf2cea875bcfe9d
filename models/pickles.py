"""Reading pickled checkpoints that hold more than tensors, without running anything they ask for.

A pickle is a program: it names callables and says what to call them with. Here the few names that
tensors need mean functions of this file, and every other name, whatever it is, means an `Inert`
class, which takes all that a pickle can do to it and does nothing. So callbacks, options and
optimizers of a training framework cost nothing and need no import. PyTorch's own reader does the
rest (zip and older formats, shared storages, byte order)."""

import pickle
import tarfile
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


class Inert:
    """Stands for an object that is no tensor. Keeps nothing; its classes can be dictionary keys."""

    __slots__ = ()
    dump_patches = False  # asked of module classes by PyTorch's reader of older files

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return self

    def __setitem__(self, key, value):
        pass

    def ignore(*_: Any) -> None:
        pass

    # __setstate__ takes classes too: their attributes stay
    append = extend = add = __setstate__ = ignore


class Untyped(Inert):
    """In place of torch.UntypedStorage; PyTorch's reader then asks for the type of an element."""

    __slots__ = ()
    dtype = torch.uint8


class Fixed:
    """A function that a pickle may call but not change: state meant for it goes nowhere."""

    __slots__ = ("function",)

    def __init__(self, function):
        self.function = function

    def __call__(self, *args):
        return self.function(*args)

    def __setstate__(self, state):
        pass


class Ordered(dict):
    """In place of an OrderedDict. The attributes of a state dict (`_metadata`) are dropped."""

    def __setstate__(self, state):
        pass


def _tensor(storage, offset, size, stride, *_):  # without requires_grad and hooks
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _tensor_of_newer_dtype(storage, offset, size, stride, requires_grad, hooks, dtype, *_):
    place = storage, offset, size, stride
    return torch._utils._rebuild_tensor_v3(*place, False, OrderedDict(), dtype)


def _parameter(data, *_):
    return data


MACHINERY = {
    "collections.OrderedDict": Fixed(Ordered),
    "torch._utils._rebuild_tensor": Fixed(_tensor),
    "torch._utils._rebuild_tensor_v2": Fixed(_tensor),
    "torch._utils._rebuild_tensor_v3": Fixed(_tensor_of_newer_dtype),
    "torch._utils._rebuild_parameter": Fixed(_parameter),
    "torch.storage.UntypedStorage": Untyped,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
MACHINERY |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}

# No checkpoint has an honest use for these. They would be inert as well; a file that names one is
# refused to warn. (getattr is not among them: early releases of Python 3.11 pickle every member of
# an enumeration with it.)
MODULES = """
asyncio bdb code codeop commands ctypes importlib io _io marshal multiprocessing nt os pdb
pickle _pickle popen2 posix posixpath pty runpy shutil socket subprocess sys timeit webbrowser
""".split()
BUILTINS = """
__import__ apply breakpoint compile delattr eval exec execfile file globals input locals open
setattr vars
""".split()


class Refused(ValueError):
    """The file names something that runs code."""


def dangerous(module: str, name: str) -> bool:
    """Tells whether module.name has no honest use in a checkpoint."""
    first, builtin = module.partition(".")[0], name.partition(".")[0]
    return first in MODULES or first in ("builtins", "__builtin__") and builtin in BUILTINS


def read(path: Path | str, *, mmap: bool = False) -> tuple[Any, list[str]]:
    """Reads a pickled file; returns its content on the CPU and the names of the classes and
    functions that became inert. Raises Refused, or whatever a damaged file leads to."""
    skipped = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            word = f"{module}.{name}"
            if word in MACHINERY:
                return MACHINERY[word]
            if dangerous(module, name):
                raise Refused(
                    f"checkpoint {path} names {shown(word)}, which runs code, so nothing was "
                    "loaded or run; do not use this file, get the checkpoint from its publisher"
                )
            return skipped.setdefault(word, type("Inert", (Inert,), {"__slots__": ()}))

    with open(path, "rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped:
        archive = "constants.pkl" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    else:
        archive = tarfile.is_tarfile(path)
    if archive:  # other readers of PyTorch would take over, which no class here restrains
        raise pickle.UnpicklingError("a TorchScript or tar archive, which is no checkpoint")
    module = types.SimpleNamespace(
        __name__="inert",
        Unpickler=Unpickler,
        load=lambda file, **options: Unpickler(file, **options).load(),
    )
    options = {"pickle_module": module, "weights_only": False, "mmap": mmap}
    content = torch.load(path, map_location="cpu", **options)
    return content, [shown(word) for word in skipped]


def shown(word: str) -> str:
    """Makes a name from a file fit for a message."""
    return ascii(word)[1:-1][:80]

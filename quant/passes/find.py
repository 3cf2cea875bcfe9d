"""Passes by their names: a word of the YAML is a file of this folder that holds a function of the
same name; module.function is any function that Python can import, shrink.shrink for one of a
shrink.py in PYTHONPATH."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable

from base.errors import unknown_word
from quant import passes
from quant.passes.declare import Declaration


def pass_names() -> list[str]:
    """Lists the passes of this folder."""
    return [name for name in _modules() if _of_folder(name)]


def find_pass(name: str) -> Callable:
    """Returns the function behind a name in the YAML. Raises ValueError where there is none."""
    module, _, function = name.rpartition(".")
    if not module:
        found = _of_folder(name)
        if found is None:
            raise ValueError(unknown_word(f"pass '{name}' is unknown", name, pass_names()))
        return found
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"pass '{name}' cannot be imported ({error}); is its folder in PYTHONPATH?"
        ) from None
    if not _is_pass(found):
        raise ValueError(
            f"'{name}' is no pass; write it as a function (job, *, option=default) -> facts"
        )
    return found


def declaration_of(name: str) -> Declaration:
    """Returns what a pass says of itself: nothing, if it says nothing, is unknown or comes from
    elsewhere, as nothing is imported for this."""
    return getattr(_of_folder(name), "declaration", Declaration())


def _modules():
    return [module.name for module in pkgutil.iter_modules(passes.__path__)]


def _of_folder(name):
    if name not in _modules():
        return None
    found = getattr(importlib.import_module(f"quant.passes.{name}"), name, None)
    return found if _is_pass(found) else None


def _is_pass(found):
    return inspect.isfunction(found) and [*inspect.signature(found).parameters][:1] == ["job"]

"""One way to look into a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


@contextmanager
def watching(
    net: nn.Module, callbacks: Mapping[str, Callable[..., Any]], *, before: bool = False
) -> Iterator[None]:
    """While the block runs, every call of a submodule of `net` is reported to callbacks[its name]
    ("" is `net` itself) as (module, inputs, output), or with `before`, ahead of the call, as
    (module, inputs). `inputs` is the tuple of positional arguments. What a callback returns is
    dropped, so that watching changes nothing. The hooks are gone when the block ends, also by an
    error. Raises AttributeError for a name that `net` does not have, before anything is hooked."""
    modules = {name: net.get_submodule(name) for name in callbacks}
    with ExitStack() as stack:
        for name, callback in callbacks.items():
            module = modules[name]
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(_deaf(callback)).remove)
        yield


def _deaf(callback: Callable[..., Any]) -> Callable[..., None]:
    """`callback` as a hook whose answer PyTorch cannot take for new inputs or a new output."""

    def hook(*arguments: Any) -> None:
        callback(*arguments)

    return hook

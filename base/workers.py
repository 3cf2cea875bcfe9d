"""Several processes at one command, as torchrun starts them:

    torchrun --nproc-per-node=2 -m tinydm sample RUN

`joined` makes them the workers of one group, which torch.distributed keeps and everything else here
asks. A process on its own is the first and only worker: nothing is exchanged, nothing changes."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

Value, Items = TypeVar("Value"), TypeVar("Items", bound=Sequence)
# A worker that fails ends the others through torchrun; one that is slow is waited for.
PATIENCE = timedelta(days=7)


def count() -> int:
    """How many workers there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def number() -> int:
    """Which of them this process is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the worker that writes, prints and decides."""
    return number() == 0


@contextmanager
def joined(allowed: bool) -> Iterator[None]:
    """While inside, the processes that torchrun has started are workers of one group, of which the
    first alone prints. If one fails, all end, and the first that fails says why. Does nothing for a
    process on its own. Raises ValueError where several were started and that is not `allowed`."""
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started == 1:
        yield
        return
    rank = os.environ.get("RANK")
    if rank is None:
        raise ValueError(
            f"WORLD_SIZE is {started}, but RANK is not set; start the command by torchrun, or "
            "unset WORLD_SIZE"
        )
    if not allowed:
        if rank != "0":
            raise SystemExit(2)
        raise ValueError(
            f"{started} workers were started, but this command works alone; start it without "
            "torchrun"
        )
    store = _form_group()
    # Ended by torchrun as by Ctrl-C: what a worker has noted is written.
    earlier = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _silence(not is_first()):
            yield
            wait()
    except BaseException:
        if _has_failed_before(store):
            raise SystemExit(1) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, earlier)
    dist.destroy_process_group()


def _form_group():
    """Returns the store that the workers share."""
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # each for the tensors of its kind
        torch.cuda.set_device(local_number() % torch.cuda.device_count())
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)
    return store


def _has_failed_before(store):
    """Whether another worker has failed already, whose store may have gone with it."""
    try:
        return store.add("tinydm: failed", 1) > 1
    except RuntimeError:
        return False


@contextmanager
def _silence(silent):
    if not silent:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def local_number() -> int:
    """Which of the workers on this machine this process is, from 0."""
    return int(os.environ.get("LOCAL_RANK", 0)) if count() > 1 else 0


@contextmanager
def _exchange():
    """Says it in a sentence where another worker has gone."""
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            "a worker waited for another one, which has ended; what it said is above, a worker "
            f"killed for want of memory says nothing ({str(error).splitlines()[0]}); run the same "
            "command to continue"
        ) from None


def agreed(value: Value) -> Value:
    """Returns what the first worker gives, any object that can be pickled, to all of them."""
    if count() == 1:
        return value
    box = [value]
    with _exchange():
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def wait() -> None:
    """Returns once all workers have come here."""
    if count() > 1:
        with _exchange():
            dist.all_reduce(torch.zeros(1))


def first_only(function: Callable[..., None]) -> Callable[..., None]:
    """The function, called by the first worker alone; for what writes the files that they share."""

    @wraps(function)
    def called(*arguments: Any, **options: Any) -> None:
        if is_first():
            function(*arguments, **options)

    return called


def part_of(items: Items) -> Items:
    """This worker's part of a list of things to do: every n-th."""
    return items[number() :: count()]


@dataclass(frozen=True)
class Share:
    """Samples start .. stop-1 of a batch of `size`. The mean over the batch is the sum over the
    shares of the mean over each times its `weight`."""

    start: int
    stop: int
    size: int
    weight: float = 1.0

    def of(self, batch: torch.Tensor) -> torch.Tensor:
        """The share of a batch (size * k, ...), whose samples have k entries each."""
        each = len(batch) // self.size
        return batch[self.start * each : self.stop * each]

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of a batch of which a tensor of `shape` (samples * k, ...) is the share."""
        return shape[0] // (self.stop - self.start) * self.size, *shape[1:]


def share_of(size: int) -> Share:
    """This worker's share of a batch of `size` samples. Without a sample of its own it computes one
    more with another worker, with weight 0."""
    start, stop = (size * i // count() for i in (number(), number() + 1))
    if start == stop:
        return Share(start, start + 1, size, 0.0)
    return Share(start, stop, size, (stop - start) / size)


def summed(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The sums over the workers of tensors of one kind and device, by one exchange."""
    if count() == 1:
        return tensors
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    with _exchange():
        dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors)]


@torch.no_grad()
def align(module: nn.Module) -> None:
    """Gives every parameter and buffer of a module the value that it has at the first worker.
    Raises ValueError where these are of other names or shapes there."""
    if count() == 1:
        return
    tensors = dict([*module.named_parameters(), *module.named_buffers()])
    own = [(name, str(t.dtype), tuple(t.shape)) for name, t in tensors.items()]
    theirs = agreed(own)
    if own != theirs:
        name = next((a or b)[0] for a, b in zip_longest(own, theirs) if a != b)
        raise ValueError(
            f"worker {number()} has come to another network than the first one ({name} differs); "
            "start all workers on machines of one kind"
        )
    parts = [t.cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    flat = torch.cat([torch.empty(0, dtype=torch.uint8), *parts])
    with _exchange():
        dist.broadcast(flat, src=0)
    if not is_first():
        for tensor, part in zip(tensors.values(), flat.split([len(part) for part in parts])):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

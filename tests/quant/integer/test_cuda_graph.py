"""Captured calls, with a GPU that is played: a graph notes the operators that run while it is
captured, and a replay runs them again on the same tensors."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quant.integer.cuda_graph import WARM_UPS, GraphedCall


class PlayedGraph(TorchDispatchMode):
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.calls:
            out.copy_(function(*args, **kwargs))

    def pool(self):
        return "pool of the first"


class PlayedStream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """torch.cuda as far as captures go; -> the memory pools that were asked for."""
    pools = []

    def graph(graph, pool=None, capture_error_mode="global"):
        pools.append(pool)
        return graph

    monkeypatch.setattr(torch.cuda, "CUDAGraph", PlayedGraph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "Stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "current_stream", PlayedStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return pools


class Function:
    """x, t -> factor * x + t, counting its calls."""

    def __init__(self, factor=2.0):
        self.factor, self.calls = torch.tensor(factor), 0

    def __call__(self, x, t):
        self.calls += 1
        return x * self.factor + t


def pair(rows, seed):
    return torch.randn(2, rows, 3, generator=torch.Generator().manual_seed(seed)).unbind()


def test_a_call_is_captured_once_and_replayed(gpu):
    function = Function()
    graphed = GraphedCall(function)
    given = [pair(4, seed) for seed in range(3)]
    results = [graphed(x, t) for x, t in given]  # kept: the next replay leaves them alone
    for (x, t), result in zip(given, results):
        assert torch.equal(result, x * 2 + t)
    assert function.calls == WARM_UPS + 1 and graphed.trouble == ""
    assert torch.equal(given[0][0], pair(4, 0)[0])


def test_every_shape_and_state_has_a_graph_and_all_share_their_memory(gpu):
    function = Function()
    graphed = GraphedCall(function)
    for rows, state in ((4, 0), (2, 0), (4, 1), (4, 0), (2, 0)):
        x, t = pair(rows, rows)
        assert torch.equal(graphed(x, t, state=state), x * 2 + t)
    assert function.calls == 3 * (WARM_UPS + 1)
    assert gpu == [None, "pool of the first", "pool of the first"]


def test_what_is_written_in_place_is_read_anew(gpu):
    function = Function()
    graphed = GraphedCall(function)
    x, t = pair(4, 0)
    graphed(x, t)
    function.factor.fill_(5.0)
    assert torch.equal(graphed(x, t), x * 5 + t)


def test_without_a_capture_the_function_is_called_as_it_is(gpu, monkeypatch):
    def refuse(graph, **options):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    function = Function()
    graphed = GraphedCall(function)
    for seed in range(2):
        x, t = pair(4, seed)
        assert torch.equal(graphed(x, t), x * 2 + t)
    assert function.calls == WARM_UPS + 2
    assert graphed.trouble == (
        "no CUDA graph, kernels are launched one by one: operation not permitted when stream is "
        "capturing"
    )


def test_errors_of_the_function_are_its_own(gpu):
    def wrong(x):
        raise ValueError("x is wrong")

    with pytest.raises(ValueError, match="x is wrong"):
        GraphedCall(wrong)(torch.zeros(1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_graph():
    graphed = GraphedCall(Function())
    x, t = pair(4, 0)
    assert torch.equal(graphed(x, t), x * 2 + t)
    assert graphed.trouble.startswith("no CUDA graph")

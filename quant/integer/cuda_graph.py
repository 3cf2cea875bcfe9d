"""A function of tensors as a CUDA graph. A step of the sampler launches a thousand kernels, which
takes longer than small batches compute; a graph is launched at once."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

WARM_UPS = 2  # kernels are compiled in the first, memory has settled in the second


class Recording(NamedTuple):
    """A captured call: `graph` computes `result` from what lies in `inputs`."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    result: torch.Tensor


class GraphedCall:
    """`function` of tensors on a GPU -> one tensor, captured once for every shape and `state` and
    replayed from then on. Where it cannot be captured it is called as it is, and `trouble` is one
    sentence why.

    A graph repeats what the function did on the GPU when it was captured: whatever else the result
    depends on has to be told as `state`, such as the time segment, or be written in place."""

    def __init__(self, function: Callable[..., torch.Tensor]):
        self.function, self.trouble = function, ""
        self.recordings: dict[Hashable, Recording] = {}

    @torch.no_grad()
    def __call__(self, *inputs: torch.Tensor, state: Hashable = None) -> torch.Tensor:
        """function(*inputs), a tensor of its own."""
        if self.trouble:
            return self.function(*inputs)
        key = state, *((x.shape, x.dtype, x.device) for x in inputs)
        with torch.cuda.device_of(inputs[0]):
            if key not in self.recordings:
                try:
                    self.recordings[key] = self._record(inputs)
                except RuntimeError as error:  # of CUDA; out of memory is one too
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    self.trouble = f"no CUDA graph, kernels are launched one by one: {reason}"
                    self.recordings.clear()
                    return self.function(*inputs)
            recording = self.recordings[key]
            for buffer, x in zip(recording.inputs, inputs):
                buffer.copy_(x)
            recording.graph.replay()
            return recording.result.clone()

    def _record(self, inputs: Sequence[torch.Tensor]) -> Recording:
        inputs = [x.clone() for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.function(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Graphs share their memory: none runs beside another, and results are copied at once.
        known = next(iter(self.recordings.values()), None)
        pool = None if known is None else known.graph.pool()
        # other threads may go on using the GPU, such as those that save images
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = self.function(*inputs)
        return Recording(graph, inputs, result)

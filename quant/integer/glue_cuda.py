"""The glue of an integer network on a GPU: quant/integer/glue.py compiled by torch.compile, which
makes one kernel of a norm, its activation and the quantization behind it.

Its sums and its exponential may round otherwise than PyTorch's own, so that a value next to the
border of two codes falls to the other side now and then: codes differ by 1 at most."""

from __future__ import annotations

import torch

from base.network import NormAct
from quant.integer import glue
from quant.integer.glue import Row, ScaleShift

VARIANTS = 64  # of a function that may be compiled: norms differ in eps, activation, what is added
Numbers = tuple[torch.Tensor, ...]  # inverse, low, high: 0-dim, so that no value is compiled in


class InductorGlue:
    """The functions of quant/integer/glue.py for tensors on one device, compiled by a backend of
    torch.compile as they are first called."""

    about = "compiled by torch.compile"
    rescale = staticmethod(glue.rescale)

    def __init__(self, backend: str = "inductor") -> None:
        self.known: dict[tuple, Numbers] = {}
        compiled = {"dynamic": True, "fullgraph": True, "backend": backend}
        self._integers = torch.compile(_integers, **compiled)
        self._quantize = torch.compile(_quantize, **compiled)
        self._norm = torch.compile(_norm, **compiled)

    def integers(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """As glue.integers."""
        return self._call(self._integers, x, row.balance, *self._numbers(row, x))

    def quantize(self, x: torch.Tensor, row: Row) -> torch.Tensor:
        """As glue.quantize."""
        return self._call(self._quantize, x, row.balance, *self._numbers(row, x))

    def softmax_quantize(self, scores: torch.Tensor, factor: float, row: Row) -> torch.Tensor:
        """As glue.softmax_quantize."""
        return self.quantize(glue.softmax(scores, factor), row)

    def norm_act(
        self,
        x: torch.Tensor,
        norm: NormAct,
        added: torch.Tensor | None = None,
        scale_shift: ScaleShift = None,
    ) -> torch.Tensor:
        """As glue.norm_act."""
        return self._call(self._norm, x, *_facts(norm), added, scale_shift)

    def norm_act_quantize(
        self,
        x: torch.Tensor,
        norm: NormAct,
        row: Row,
        added: torch.Tensor | None = None,
        scale_shift: ScaleShift = None,
    ) -> torch.Tensor:
        """As glue.norm_act_quantize."""
        given = x, *_facts(norm), added, scale_shift, row.balance
        return self._call(self._norm, *given, *self._numbers(row, x))

    def _numbers(self, row: Row, x: torch.Tensor) -> Numbers:
        key = *row[:3], x.device
        if key not in self.known:
            self.known[key] = torch.tensor(row[:3], device=x.device).unbind()
        return self.known[key]

    def _call(self, function, *given):
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            return function(*given)


def _facts(norm):
    return norm.weight, norm.bias, norm.num_groups, norm.eps, norm.silu


def _integers(x, balance, inverse, low, high):
    x = x if balance is None else x * balance
    return torch.minimum(torch.maximum((x * inverse).round(), low), high)


def _quantize(x, balance, inverse, low, high):
    # unsigned codes count from the lowest
    return (_integers(x, balance, inverse, low, high) - low).to(torch.uint8)


def _norm(x, weight, bias, groups, eps, silu, added, scale_shift, *quantization):
    if added is not None:
        x = x + added[:, :, None, None]
    y = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    y = glue.act(y, silu, scale_shift)
    return _quantize(y, *quantization) if quantization else y

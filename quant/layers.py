"""Quantized layers: a float layer plus its quantizers.

The forward of a hardened layer, which an integer engine has to reproduce bit for bit, is

    conv(q_x - z_x, w_int) * (s_x * s_w) + b

in float32 on integer-valued tensors (w_int = code - zero point), the product of scales computed
first. The sum is exact below 2^24; beyond, which takes hundreds of channels at 8 bits, float32
rounds it (1e-6 of it) where an integer engine does not. A convolution that reads a concatenation
with own scales for each part adds one such product per part to the first, which has the bias.
Scales that vary inside the sum (activations per channel or per group) multiply q_x - z_x instead.
What is not quantized has no factor.

With own weights for every time segment w_int and s_w are those of the segment; a batch then lies in
one segment.

A balanced layer (quant/passes/balance.py) reads x * inverse_balance, one factor per input channel,
and its weight holds the balance: W_c * balance_c. An integer engine merges that factor with the
1/s_x of its quantize step."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from base.network import Matmul, Operand
from quant.groups import activation_groups, weight_groups
from quant.observer import fit_scales
from quant.quantizer import Quantizer
from quant.rules import role_of
from quant.spec import QuantSpec
from quant.timeline import Timeline

QuantizerInputs = list[tuple[Quantizer, torch.Tensor]]  # each with what it reads


def operation(layer: nn.Module) -> Callable[..., torch.Tensor]:
    """The functional form of a float layer: f(x, weight, bias). Raises ValueError for a convolution
    that a quantized layer cannot be."""
    if isinstance(layer, nn.Linear):
        return F.linear
    if layer.groups != 1:
        raise ValueError(f"grouped convolutions cannot be quantized (role {role_of(layer)})")
    if layer.padding_mode != "zeros":
        raise ValueError(
            f"convolutions with padding_mode '{layer.padding_mode}' cannot be quantized (role "
            f"{role_of(layer)}); only 'zeros' can"
        )
    function = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
    return partial(function, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


class QuantLayer(nn.Module):
    """Conv1d, Conv2d or Linear with a quantized weight and a quantized input (either may be left
    alone).

    Life: float weight; ranges fitted; learned rounding where asked for; hardened, when `weight_int`
    replaces the float weight."""

    def __init__(
        self,
        layer: nn.Module,
        weight_spec: QuantSpec,
        input_spec: QuantSpec,
        timeline: Timeline,
        split: bool,
        balanced: bool = False,
    ):
        super().__init__()
        self.role, self.operation = role_of(layer), operation(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self.shape, self.trailing = tuple(layer.weight.shape), layer.weight.dim() - 2
        splits = tuple(getattr(layer, "input_splits", None) or ()) if split else ()
        self.parts = splits or (self.shape[1],)
        self.weight_quantizer = self.input_quantizer = self.rounding = None
        if weight_spec.bits < 32:
            group_of = weight_groups(weight_spec.per, self.shape, splits=splits)
            own = timeline if weight_spec.per_segment else None
            self.weight_quantizer = Quantizer(weight_spec, group_of, own)
        if input_spec.bits < 32:
            options = {"group_size": input_spec.group_size, "splits": splits}
            group_of = activation_groups(input_spec.per, self.shape[1], self.trailing, **options)
            self.input_quantizer = Quantizer(input_spec, group_of, timeline)
        self.register_buffer("weight_int", None)
        self.register_buffer("inverse_balance", torch.ones(self.shape[1]) if balanced else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's answer to x (N, in, ...), or (N, ..., in) of a Linear."""
        x, scales = self.quantize_input(self.balanced_input(x))
        weight = self.weight_in_use()
        pieces = [(x, weight)]
        if len(self.parts) > 1:
            pieces = zip(x.split(self.parts, dim=1), weight.split(self.parts, dim=1))
        out = None
        for part, (x_part, weight_part) in enumerate(pieces):
            term = self.operation(x_part, weight_part, None)
            factor = self.factor(scales, part)
            if factor is not None:
                term = term * factor
            if part == 0:
                out = term if self.bias is None else term + self.per_channel(self.bias)
            else:
                out = out + term
        return out

    def factor(self, scales: Sequence[torch.Tensor] | None, part: int) -> torch.Tensor | None:
        """What the product of one part is multiplied with: s_x * s_w, what there is of them."""
        own = None if scales is None else scales[part]
        if self.weight_int is None:
            return own
        weights = self.per_channel(self.weight_scales().chunk(len(self.parts))[part])
        return weights if own is None else own * weights

    def balanced_input(self, x: torch.Tensor) -> torch.Tensor:
        """x with its channels balanced, as the input quantizer reads it."""
        balance = self.inverse_balance
        return x if balance is None else x * self.per_channel(balance)

    def quantizer_inputs(self, x: torch.Tensor) -> QuantizerInputs:
        """The input quantizer and what it reads, if there is one."""
        q = self.input_quantizer
        return [] if q is None else [(q, self.balanced_input(x))]

    def quantize_input(self, x: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        """-> what is multiplied, and the scales for the product of each part (None: no factor)."""
        q = self.input_quantizer
        if q is None or not q.enabled:
            return x, None
        if q.spec.per == "tensor":
            return q.codes(x), q.part_scales(x)
        return q(x), None

    def input_error(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, in, ...) minus what its quantizer, behind the balance, makes of it; 0 if off."""
        if not self.input_quantizer.enabled:
            return torch.zeros_like(x)
        factor = 1.0 if self.inverse_balance is None else self.per_channel(self.inverse_balance)
        return x - self.input_quantizer(x * factor) / factor

    def weight_in_use(self) -> torch.Tensor:
        """Integers when hardened; else the weight as it is, softly rounded, or on its grid."""
        if self.weight_int is not None:
            return self.weight_int[self.segment()] if self.has_segments else self.weight_int
        if self.rounding is not None:
            return self.rounding()
        q = self.weight_quantizer
        return q(self.weight) if q is not None and q.enabled else self.weight

    @torch.no_grad()
    def balance(self, factors: torch.Tensor) -> None:
        """Divide input channel c by factors[c] (in,) and multiply the weight's column c with it, on
        top of earlier balances: the product stays. The float network keeps the weight it shared."""
        self.inverse_balance = self.inverse_balance / factors
        self.scale_weight(factors[None])

    @torch.no_grad()
    def scale_weight(self, factors: torch.Tensor) -> None:
        """Multiply the weight with factors (out, 1) or (1, in)."""
        weight = self.weight * factors.reshape(*factors.shape, *[1] * self.trailing)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def per_channel(self, values: torch.Tensor) -> torch.Tensor:
        """(channels,) or (1,) shaped to multiply x or a result: channels are axis 1 of a
        convolution, the last of a Linear."""
        return values.reshape(-1, *[1] * self.trailing)

    @property
    def has_segments(self) -> bool:
        """Whether there are several weights, one for each time segment."""
        return self.weight_quantizer is not None and len(self.weight_quantizer.scale) > 1

    def segment(self) -> int:
        """The time segment of the weight in use. Raises ValueError for a batch in several."""
        segment = self.weight_quantizer.timeline.segment if self.has_segments else 0
        if torch.is_tensor(segment):
            raise ValueError(
                "the samples of a batch lie in different time segments, which have different "
                "weights; run the samples of each segment apart"
            )
        return segment

    def weight_scales(self) -> torch.Tensor:
        """Scales (groups,) of the weight in use."""
        return self.weight_quantizer.scale[self.segment()]

    def unsigned_codes(self) -> torch.Tensor:
        """The hardened weight as codes 0..2^b-1, ([segments,] out, in, ...), as they are stored."""
        return self.weight_int + self.zero_points() - self.weight_quantizer.low

    @torch.no_grad()
    def set_unsigned_codes(self, codes: torch.Tensor) -> None:
        """Become the hardened layer of these codes; the weight quantizer has its zero points."""
        self.weight_int = codes.float() + self.weight_quantizer.low - self.zero_points()
        self.weight = self.rounding = None

    def zero_points(self) -> torch.Tensor:
        """Zero points, shaped to broadcast against the codes of the weight."""
        q = self.weight_quantizer
        return q.zero_point[:, q.group_of] if self.has_segments else q.zero_point[0][q.group_of]

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """Shape of the codes: ([segments,] out, in, ...)."""
        return (len(self.weight_quantizer.scale), *self.shape) if self.has_segments else self.shape

    def fit_weight(self) -> None:
        """Choose the weight's scales from the weight; concatenated parts each from their own
        columns. Raises ValueError for own weights in every time segment."""
        q = self.weight_quantizer
        if self.has_segments:
            raise ValueError(
                "own weights for every time segment (per_segment) are made by the pass "
                "segment_models, inside which fit_ranges and reconstruct belong; passes that fit "
                "ranges before it for trials, such as balance and allocate_bits, do not go with "
                "per_segment"
            )
        for part, columns in enumerate(self.weight.detach().split(self.parts, dim=1)):
            values = columns.flatten(1) if q.spec.per == "channel" else columns.reshape(1, -1)
            fit_scales(q, [values], first=part * len(values))

    @torch.no_grad()
    def harden(self) -> None:
        """Replace the float weight by integers: of the learned rounding if there is one."""
        q, rounding = self.weight_quantizer, self.rounding
        if q is not None and self.weight_int is None:
            codes = q.codes(self.weight) if rounding is None else rounding.codes(hard=True)
            self.weight_int, self.weight, self.rounding = codes.detach().clone(), None, None


class QuantMatmul(nn.Module):
    """Product of two quantized activations: (q_a - z_a) @ (q_b - z_b) * (s_a * s_b), per tensor or
    per head (axis 1)."""

    def __init__(self, matmul: Matmul, specs: list[QuantSpec], timeline: Timeline):
        super().__init__()
        self.roles, self.num_heads = matmul.roles, matmul.num_heads
        self.a_quantizer, self.b_quantizer = (self._quantizer(spec, timeline) for spec in specs)

    def _quantizer(self, spec, timeline):
        if spec.bits >= 32:
            return None
        if spec.per not in ("tensor", "head"):
            raise ValueError(
                "operands of attention products are quantized per tensor or per head, not "
                f"'per: {spec.per}'"
            )
        per = spec.per if self.num_heads > 1 else "tensor"
        return Quantizer(spec, activation_groups(per, self.num_heads, 2), timeline)

    def quantizer_inputs(self, a: torch.Tensor, b: torch.Tensor) -> QuantizerInputs:
        """The quantizers of the operands that are quantized, each with what it reads."""
        pairs = (self.a_quantizer, a), (self.b_quantizer, b)
        return [(q, x) for q, x in pairs if q is not None]

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a (N, [heads,] rows, inner) @ b (N, [heads,] inner, columns)."""
        scales, operands = [], []
        for x, q in ((a, self.a_quantizer), (b, self.b_quantizer)):
            on = q is not None and q.enabled
            operands.append(q.codes(x) if on else x)
            scales += [q.table(q.scales(), x)] if on else []
        out = operands[0] @ operands[1]
        return out * math.prod(scales) if scales else out


class QuantOperand(nn.Module):
    """An activation (N, C) on its grid, (q_x - z_x) * s_x; where it has parts, each has its own s_x
    and z_x. Scale and shift enter norm(h) * (1 + scale) + shift so (split embedding, repository
    iszry/HKU_2023_Summer_Research)."""

    def __init__(self, operand: Operand, spec: QuantSpec, timeline: Timeline, split: bool):
        super().__init__()
        self.role, splits = operand.role, operand.input_splits
        options = {"group_size": spec.group_size, "splits": splits if split else ()}
        group_of = activation_groups(spec.per, sum(splits), 0, **options)
        self.input_quantizer = Quantizer(spec, group_of, timeline)

    def quantizer_inputs(self, x: torch.Tensor) -> QuantizerInputs:
        """The quantizer and what it reads."""
        return [(self.input_quantizer, x)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, C) on its grid."""
        return self.input_quantizer(x) if self.input_quantizer.enabled else x


SWAP = dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Linear), QuantLayer)
SWAP |= {Matmul: QuantMatmul, Operand: QuantOperand}

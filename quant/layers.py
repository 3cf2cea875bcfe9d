"""Quantized layers: a float layer plus its quantizers.

The forward of a hardened layer, which an integer engine has to reproduce bit for bit, is

    conv(q_x - z_x, w_int) * s_x * s_w + b

evaluated left to right in float32 on integer-valued tensors (w_int = code - zero point). The sum is
exact below 2^24; beyond, which takes hundreds of channels at 8 bits, float32 rounds it (1e-6 of it)
where an integer engine does not. A convolution that reads a concatenation with own scales for each
part is the sum of one such product per part, then + b. Scales that vary inside the sum (activations
per channel or per group) multiply q_x - z_x instead. What is not quantized has no factor.

With own weights for every time segment w_int and s_w are those of the segment; a batch then lies in
one segment.

A balanced layer (quant/balance.py) reads x * inverse_balance, one factor per input channel, and its
weight holds the balance: W_c * balance_c. An integer engine merges that factor with the 1/s_x of
its quantize step."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from base.network import Matmul, Operand
from quant.groups import activation_groups, weight_groups
from quant.quantizer import Quantizer


def operation(layer):
    """The functional form of a float layer: f(x, weight, bias)."""
    if isinstance(layer, nn.Linear):
        return F.linear
    function = F.conv2d if isinstance(layer, nn.Conv2d) else F.conv1d
    return partial(function, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)


class QuantLayer(nn.Module):
    """Conv1d, Conv2d or Linear with a quantized weight and a quantized input (either may be left
    alone).

    Life: float weight; ranges fitted; learned rounding where asked for; hardened, when `weight_int`
    replaces the float weight."""

    def __init__(self, layer, weight_spec, input_spec, timeline, split, balanced=False):
        super().__init__()
        if getattr(layer, "groups", 1) != 1:
            raise ValueError(f"grouped convolutions cannot be quantized (role {layer.role})")
        self.role, self.operation = layer.role, operation(layer)
        self.weight, self.bias = layer.weight, layer.bias
        self.shape, self.trailing = tuple(layer.weight.shape), layer.weight.dim() - 2
        splits = tuple(getattr(layer, "input_splits", None) or ()) if split else ()
        self.parts = splits or (self.shape[1],)
        self.weight_quantizer = self.input_quantizer = self.rounding = None
        if weight_spec.bits < 32:
            self.weight_quantizer = Quantizer(
                weight_spec,
                weight_groups(weight_spec.per, self.shape, splits=splits),
                timeline if weight_spec.per_segment else None,
            )
        if input_spec.bits < 32:
            group_of = activation_groups(
                input_spec.per,
                self.shape[1],
                self.trailing,
                group_size=input_spec.group_size,
                splits=splits,
            )
            self.input_quantizer = Quantizer(input_spec, group_of, timeline)
        self.register_buffer("weight_int", None)
        self.register_buffer("inverse_balance", torch.ones(self.shape[1]) if balanced else None)

    def forward(self, x):
        if self.inverse_balance is not None:
            x = x * self.per_channel(self.inverse_balance)
        x, scales = self.quantize_input(x)
        weight = self.weight_in_use()
        if len(self.parts) > 1:
            pieces = zip(x.split(self.parts, dim=1), weight.split(self.parts, dim=1))
        else:
            pieces = [(x, weight)]
        out = 0
        for part, (x_part, weight_part) in enumerate(pieces):
            term = self.operation(x_part, weight_part, None)
            if scales:
                term = term * scales[part]
            if self.weight_int is not None:
                term = term * self.per_channel(self.weight_scales().chunk(len(self.parts))[part])
            out = term if part == 0 else out + term
        return out if self.bias is None else out + self.per_channel(self.bias)

    def quantize_input(self, x):
        """-> what is multiplied, and the scales to multiply the product of each part with (None: no
        factor)."""
        q = self.input_quantizer
        if q is None or not q.active(x):
            return x, None
        if q.spec.per == "tensor":
            return q.codes(x), q.part_scales(x)
        return q(x), None

    def input_error(self, x):
        """x (N, in, ...) minus what its quantizer, behind the balance, makes of it; 0 where that is
        switched off."""
        factor = 1.0 if self.inverse_balance is None else self.per_channel(self.inverse_balance)
        return (
            x - self.input_quantizer(x * factor) / factor
            if self.input_quantizer.enabled
            else torch.zeros_like(x)
        )

    def weight_in_use(self):
        """Integers when hardened; else the weight as it is, softly rounded, or on its grid."""
        if self.weight_int is not None:
            return self.weight_int[self.segment()] if self.has_segments else self.weight_int
        if self.rounding is not None:
            return self.rounding()
        q = self.weight_quantizer
        return q(self.weight) if q is not None and q.enabled else self.weight

    @torch.no_grad()
    def balance(self, factors):
        """Divide input channel c by factors[c] (in,) and multiply the weight's column c with it, on
        top of earlier balances; the product stays what it is. The float network, which shared the
        weight, keeps its own."""
        self.inverse_balance = self.inverse_balance / factors
        self.scale_weight(factors[None])

    @torch.no_grad()
    def scale_weight(self, factors):
        """Multiply the weight with factors (out, 1) or (1, in)."""
        self.weight = nn.Parameter(
            self.weight * factors.reshape(*factors.shape, *[1] * self.trailing), requires_grad=False
        )

    def per_channel(self, values):
        """(channels,) or (1,) shaped to multiply x or a result: channels are axis 1 of a
        convolution, the last of a Linear."""
        return values.reshape(-1, *[1] * self.trailing)

    @property
    def has_segments(self):
        """Whether there are several weights, one for each time segment."""
        return self.weight_quantizer is not None and len(self.weight_quantizer.scale) > 1

    def segment(self):
        """Of the weight in use. Raises ValueError for a batch that spans segments."""
        segment = self.weight_quantizer.timeline.segment if self.has_segments else 0
        if torch.is_tensor(segment):
            raise ValueError(
                "the samples of a batch lie in different time segments, which have different "
                "weights; run "
                "the samples of each segment apart"
            )
        return segment

    def weight_scales(self):
        return self.weight_quantizer.scale[self.segment()]

    def unsigned_codes(self):
        """The hardened weight as codes 0..2^b-1, ([segments,] out, in, ...), as they are stored."""
        return self.weight_int + self.zero_points() - self.weight_quantizer.low

    @torch.no_grad()
    def set_unsigned_codes(self, codes):
        """Become the hardened layer of these codes; the weight quantizer's zero points are in
        place."""
        self.weight_int = codes.float() + self.weight_quantizer.low - self.zero_points()
        self.weight = self.rounding = None

    def zero_points(self):
        q = self.weight_quantizer
        return q.zero_point[:, q.group_of] if self.has_segments else q.zero_point[0][q.group_of]

    @property
    def codes_shape(self):
        return (len(self.weight_quantizer.scale), *self.shape) if self.has_segments else self.shape

    def fit_weight(self):
        """Choose the weight's scales from the weight; concatenated parts each from their own
        columns."""
        q = self.weight_quantizer
        if self.has_segments:
            raise ValueError(
                "own weights for every time segment (per_segment) are made by the pass "
                "segment_models, "
                "inside which fit_ranges and reconstruct belong; passes that fit ranges before it "
                "for "
                "trials, such as balance and allocate_bits, do not go with per_segment"
            )
        for part, columns in enumerate(self.weight.detach().split(self.parts, dim=1)):
            values = columns.flatten(1) if q.spec.per == "channel" else columns.reshape(1, -1)
            q.fit([values], first=part * len(values))

    @torch.no_grad()
    def harden(self):
        """Replace the float weight by integers: learned rounding where there is one, nearest
        otherwise."""
        if self.weight_quantizer is None or self.weight_int is not None:
            return
        learned = self.rounding is not None
        codes = (
            self.rounding.codes(hard=True) if learned else self.weight_quantizer.codes(self.weight)
        )
        self.weight_int, self.weight, self.rounding = codes.detach().clone(), None, None


class QuantMatmul(nn.Module):
    """Product of two quantized activations: (q_a - z_a) @ (q_b - z_b) * s_a * s_b, per tensor or
    per head (axis 1)."""

    def __init__(self, matmul, specs, timeline):
        super().__init__()
        self.roles = matmul.roles
        self.a_quantizer, self.b_quantizer = (
            self.build(spec, matmul.num_heads, timeline) for spec in specs
        )

    @staticmethod
    def build(spec, num_heads, timeline):
        if spec.bits >= 32:
            return None
        if spec.per not in ("tensor", "head"):
            raise ValueError(
                "operands of attention products are quantized per tensor or per head, not "
                f"'per: {spec.per}'"
            )
        per = spec.per if num_heads > 1 else "tensor"
        return Quantizer(spec, activation_groups(per, num_heads, 2), timeline)

    def forward(self, a, b):
        scales, operands = [], []
        for x, q in ((a, self.a_quantizer), (b, self.b_quantizer)):
            on = q is not None and q.active(x)
            operands.append(q.codes(x) if on else x)
            scales += [q.table(q.scales(), x)] if on else []
        out = operands[0] @ operands[1]
        for scale in scales:
            out = out * scale
        return out


class QuantOperand(nn.Module):
    """An activation (N, C) on its grid, (q_x - z_x) * s_x; where it has parts, each has its own s_x
    and z_x. Scale and shift enter norm(h) * (1 + scale) + shift so (split embedding, repository
    iszry/HKU_2023_Summer_Research)."""

    def __init__(self, operand, spec, timeline, split):
        super().__init__()
        self.role = operand.role
        group_of = activation_groups(
            spec.per,
            sum(operand.input_splits),
            0,
            group_size=spec.group_size,
            splits=operand.input_splits if split else (),
        )
        self.input_quantizer = Quantizer(spec, group_of, timeline)

    def forward(self, x):
        return self.input_quantizer(x) if self.input_quantizer.active(x) else x


SWAP = {
    nn.Conv1d: QuantLayer,
    nn.Conv2d: QuantLayer,
    nn.Linear: QuantLayer,
    Matmul: QuantMatmul,
    Operand: QuantOperand,
}

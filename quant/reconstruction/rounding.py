"""AdaRound: learned rounding of a weight (Nagel et al. 2020, arXiv:2004.10568, Eq. 22 to 24),

    W_q = s clamp(floor(W / s) + h(alpha), low, high),
    h(alpha) = clamp(1.2 sigmoid(alpha) - 0.1, 0, 1)

in codes from which the zero point has been taken; learned with lambda sum(1 - |2h - 1|^beta), which
drives h to 0 or 1."""

import torch
from torch import nn

from quant.quantizer import Quantizer

GAMMA, ZETA = -0.1, 1.1  # ends of the stretched sigmoid


class Rounding(nn.Module):
    """Rounding variables of one weight: h(alpha) in [0, 1] is added to a floor. It starts as the
    weight itself, at floor + h = W/scale; or, given centred codes of W's shape to `start` from,
    halfway between both, where the floor is a neighbour of the code or the code itself."""

    def __init__(
        self, weight: torch.Tensor, quantizer: Quantizer, start: torch.Tensor | None = None
    ):
        super().__init__()
        self.quantizer = quantizer
        ratio = weight.detach() * quantizer.table(quantizer.scale, weight).reciprocal()
        floor = ratio.floor()
        if start is not None:
            floor = floor.clamp(start - 1, start)
            ratio = ((ratio + start) / 2).clamp(floor, floor + 1)
        self.register_buffer("floor", floor, persistent=False)
        self.alpha = nn.Parameter(-torch.log((ZETA - GAMMA) / (ratio - floor - GAMMA) - 1))

    def h(self) -> torch.Tensor:
        """Returns what is added to the floor."""
        return (torch.sigmoid(self.alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def codes(self, hard: bool) -> torch.Tensor:
        """Centred codes: fractional while learning, integer when hard (alpha >= 0 rounds up)."""
        q = self.quantizer
        zero_point = q.table(q.zero_point, self.floor)
        up = (self.alpha >= 0).float() if hard else self.h()
        return (self.floor + up).clamp(q.low - zero_point, q.high - zero_point)

    def forward(self) -> torch.Tensor:
        """The soft-quantized weight."""
        return self.codes(hard=False) * self.quantizer.table(self.quantizer.scale, self.floor)

    def penalty(self, beta: float) -> torch.Tensor:
        """sum (1 - |2h - 1|^beta): zero once every h is 0 or 1."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()

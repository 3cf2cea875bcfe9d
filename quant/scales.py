"""What gives a quantizer its table of scales while a pass learns it: a model in place of a free
scale for every segment. In the end the table stays, so that the model costs nothing to run."""

from collections.abc import Callable

import torch
from torch import nn

from quant.network import QuantizedNet, input_quantizers
from quant.quantizer import Quantizer


class SoftScale(nn.Module):
    """`forward()` is the table (segments, groups), with gradients."""

    done = 0.0  # share of its learning that is over

    def codes(self, quantizer: Quantizer, x: torch.Tensor) -> torch.Tensor:
        """Codes of x, in units of the table."""
        return quantizer.codes_at(self(), x)

    def hard(self) -> torch.Tensor:
        """The table that stays."""
        return self()

    def penalty(self) -> float | torch.Tensor:
        """What is added to the loss."""
        return 0.0


def attach(net: QuantizedNet, make: Callable[[Quantizer], SoftScale]) -> int:
    """Give every activation quantizer of `net` that is learnable and not static the soft scale
    make(quantizer); returns how many. Raises ValueError on a timeline of one segment, where there
    is nothing to model, and where scales are modelled already."""
    if net.timeline.num_segments == 1:
        raise ValueError(
            "scales that depend on time need more than one time segment; set segments: per_step"
        )
    quantizers = [q for q in input_quantizers(net).values() if q.learnable and not q.spec.static]
    if any(q.soft_scale is not None or q.made_by is not None for q in quantizers):
        raise ValueError(
            "scales are already given by an earlier pass (dynamic_scales or group_scales); leave "
            "one out"
        )
    for q in quantizers:
        q.soft_scale = make(q).to(q.scale.device)
    return len(quantizers)

"""What surrounds a quantized network: the bypass of its input, the correction of its noise."""

import torch
from torch import nn

from quant.convert import quant_layers


class Bypass(nn.Module):
    """The table `gain` K (S, outputs, C) of a quantized network, zero until it is fitted; the
    network, whose module `bypass` it becomes, stores it and adds `forward(x)` to its answer."""

    def __init__(self, net, outputs):
        super().__init__()
        # the stem is no part of this module
        self.__dict__["stem"], self.timeline = stem_of(net), net.timeline
        self.register_buffer(
            "gain", torch.zeros(self.timeline.num_segments, outputs, self.stem.shape[1])
        )
        self.to(next(net.parameters()).device)
        net.bypass = self
        net.register_forward_hook(
            lambda module, arguments, answer: answer + module.bypass(arguments[0])
        )

    def forward(self, x):
        """What x (N, C, H, W) adds to the answer (N, outputs, H, W) at the time that the network
        has been told."""
        return (self.gain[self.timeline.segment] @ self.stem.input_error(x).flatten(2)).unflatten(
            2, x.shape[2:]
        )


def stem_of(net):
    """The layer that reads x on a grid; None where x is read as it is."""
    return next(
        (
            m
            for m in quant_layers(net).values()
            if m.role == "stem" and m.input_quantizer is not None
        ),
        None,
    )


class Correction(nn.Module):
    """Tables over the network's time, zero (the identity) until they are filled: `slope` k (S,),
    `rows` (S, C, H, 1) and `columns` (S, C, 1, W), whose sum is b (per channel H = W = 1), and
    `variance` sigma_q^2 (S,), of the corrected eps. `times` (S,) ascend. A module, so that the
    network that it belongs to moves and stores it."""

    def __init__(self, times, num_channels, height=1, width=1):
        super().__init__()
        self.register_buffer("times", times.float())
        self.register_buffer("slope", torch.zeros(len(times)))
        self.register_buffer("rows", torch.zeros(len(times), num_channels, height, 1))
        self.register_buffer("columns", torch.zeros(len(times), num_channels, 1, width))
        self.register_buffer("variance", torch.zeros(len(times)))

    def entries(self, t):
        """Entries (N,) of the tables for the times t (N,): the nearest, at most half as far as its
        nearer neighbour. Raises ValueError for a time farther away than that."""
        gaps = nn.functional.pad(self.times.diff(), (1, 1), value=torch.inf)
        # of a lone entry: itself
        reach = torch.minimum(gaps[1:], gaps[:-1]).nan_to_num(posinf=0.0) / 2
        distance, entries = (t[:, None] - self.times).abs().min(1)
        if (distance > reach[entries]).any():
            far = float(t[(distance > reach[entries]).nonzero()[0]])
            raise ValueError(
                f"the noise correction of this network has no statistics for time {far:g} (it has "
                f"{len(self.times)} times from {self.times[0]:g} to {self.times[-1]:g}); sample "
                "with the "
                "steps it was quantized for, or quantize again with these"
            )
        return entries

    def eps(self, answer, t):
        """The corrected answer of a network, guidance included, at the times t (N,); its channels
        after the first C (a learned variance) stay as they are."""
        i, num_channels = self.entries(t), self.rows.shape[1]
        e = (answer[:, :num_channels] - (self.rows[i] + self.columns[i])) / (
            1 + self.slope[i].reshape(-1, 1, 1, 1)
        )
        return torch.cat([e, answer[:, num_channels:]], dim=1)

    def noise_variance(self, t):
        """sigma_q^2 at time t, a number."""
        return float(
            self.variance[self.entries(torch.tensor([float(t)], device=self.times.device))]
        )

"""Quantization-aware training: what of a converted network is learned, and how it ends as integers
and a table.

Static (LSQ, Esser et al. 2020, arXiv:1902.08153): scales are parameters whose gradient is
multiplied by 1/sqrt(values that share the scale * largest code) (Section 2.2; Adam feels that in
clipping and in its epsilon only). Dynamic (TDQ, So et al. 2023, arXiv:2306.02316): scales of
activations are functions of time, each sample's at its own t, without that factor; scales of
weights as before. Both begin at fitted ranges and keep the zero points of these; rounding passes
gradients straight through to the weights. The loss is the model's own (tinydm/training)."""

from collections.abc import Iterable

import torch
from torch import nn

from quant.calibration.dataset import CalibrationSet
from quant.network import QuantizedNet, fit, harden, input_quantizers, observing, quant_layers
from quant.passes.dynamic_scales import DynamicScale, functions_of, retabulated

SMALLEST = 1e-8  # of a scale


def prepare(net: QuantizedNet, calibration: CalibrationSet, dynamic: bool) -> None:
    """Make a converted network (of one time segment) learnable, begun at the ranges of a
    CalibrationSet; with `dynamic` by functions of time, one in each quantizer of an activation,
    that read the times of every batch. Raises ValueError where no scale could be a function."""
    num_values = _fit_ranges(net, calibration)
    net.requires_grad_(True)
    for layer in quant_layers(net).values():
        q = layer.weight_quantizer
        if q is not None:
            damp(q.scale, layer.weight.numel() / q.scale.numel() * q.high)
    for q in input_quantizers(net).values():
        q.scale.requires_grad_(q.learnable and not dynamic)
    learned = [q for q in input_quantizers(net).values() if q.learnable]
    if not dynamic:
        for q in learned:
            damp(q.scale, num_values[q] * q.high)
        return
    if not learned:
        raise ValueError(
            "no quantized activation has a scale that could depend on time; set bits.input below 16"
        )
    for q in learned:
        start = q.scale[0].detach().cpu()
        q.soft_scale = DynamicScale(torch.zeros(1), start).to(q.scale.device)
    net.timeline.segment = slice(None)  # row i of a table of scales is that of sample i
    net.register_forward_pre_hook(lambda module, arguments: set_times(module, arguments[1]))


@torch.no_grad()
def _fit_ranges(net, calibration):
    """Fits all scales -> {activation quantizer: how many values of a sample share its scale}."""
    device = next(net.parameters()).device
    samples = calibration.subset(None, net.timeline, 0)
    with observing(net, len(samples)):
        for arguments in samples.batches(64):
            net(*(a.to(device) for a in arguments))
    num_values = {q: observer.num_values for q, observer in net.observers.items()}
    fit(net)
    return num_values


def damp(scale: nn.Parameter, weight: float) -> None:
    """Multiply the gradient of a parameter by 1/sqrt(weight)."""
    scale.register_hook(lambda grad: grad * weight**-0.5)


def set_times(net: nn.Module, t: torch.Tensor) -> None:
    """Tell the functions of time in `net` the times t (N,) of the coming samples."""
    for q in input_quantizers(net).values():
        if q.soft_scale is not None:
            q.soft_scale.times = t


def scales_of(net: nn.Module) -> list[nn.Parameter]:
    """The scales that are learned as such, which have to stay positive."""
    quantizers = [layer.weight_quantizer for layer in quant_layers(net).values()]
    quantizers = [q for q in quantizers if q is not None] + [*input_quantizers(net).values()]
    return [q.scale for q in quantizers if q.scale.requires_grad]


def finish(
    net: QuantizedNet, times: Iterable[float]
) -> tuple[QuantizedNet, dict[str, nn.Parameter]]:
    """-> (the trained network hardened, with a table of scales at the sampler's network times (S,)
    if it has functions of time; those functions, named as in functions_of). It is on the CPU."""
    net = net.cpu()
    set_times(net, torch.zeros(1))  # any one: the tables come from the functions below
    harden(net)
    functions = functions_of(net)
    return (retabulated(net, functions, times) if functions else net), functions

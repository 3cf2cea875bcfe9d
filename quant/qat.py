"""Quantization-aware training: what of a converted network is learned, and how it ends as integers
and a table.

Static (LSQ, Esser et al. 2020, arXiv:1902.08153): scales are parameters whose gradient is
multiplied by 1/sqrt(values that share the scale * largest code) (Section 2.2; Adam feels that in
clipping and in its epsilon only). Dynamic (TDQ, So et al. 2023, arXiv:2306.02316): scales of
activations are functions of time, each sample's at its own t, without that factor; scales of
weights as before. Both begin at fitted ranges and keep the zero points of these; rounding passes
gradients straight through to the weights. The loss is the model's own (models/tasks.py)."""

import torch
from torch import nn

from quant.network import input_quantizers, quant_layers
from quant.passes.dynamic_scales import DynamicScale, functions_of, retabulated
from quant.passes.fit_ranges import fit_ranges
from quant.passes.job import Job

SMALLEST = 1e-8  # of a scale


def prepare(net, calibration, dynamic):
    """Make a converted network (of one time segment) learnable, begun at the ranges of a
    CalibrationSet.

    Returns {NAME: function of time}, names with | for dots: empty if static. The network reads
    these functions at the times of every batch, copies of it their own; who trains has to register
    them beside it. Raises ValueError where there is no scale to make a function of."""
    fit_ranges(
        Job(model=None, net=net, calibration=calibration, graph=None, resume_folder=None),
        num_samples=len(calibration),
    )
    net.requires_grad_(True)
    functions = nn.ModuleDict()
    for layer in quant_layers(net).values():
        if layer.weight_quantizer is not None:
            scale = layer.weight_quantizer.scale
            damp(scale, layer.weight.numel() / scale.numel() * layer.weight_quantizer.high)
    for name, q in input_quantizers(net).items():
        q.scale.requires_grad_(q.learnable and not dynamic)
        if q.learnable and dynamic:
            q.__dict__["soft_scale"] = functions[name.replace(".", "|")] = DynamicScale(
                torch.zeros(1), q.scale[0].detach().cpu()
            ).to(q.scale.device)
        elif q.learnable:
            damp(q.scale, q.num_values * q.high)
    if dynamic:
        if not functions:
            raise ValueError(
                "no quantized activation has a scale that could depend on time; set bits.input "
                "below 16"
            )
        # row i of a table of scales is that of sample i
        net.timeline.segment = slice(None)
        net.register_forward_pre_hook(lambda module, arguments: set_times(module, arguments[1]))
    return functions


def damp(scale, weight):
    """Multiply the gradient of a parameter by 1/sqrt(weight)."""
    scale.register_hook(lambda grad: grad * weight**-0.5)


def set_times(net, t):
    """Tell the functions of time in `net` the steps t (N,) of the coming samples."""
    for q in input_quantizers(net).values():
        if q.soft_scale is not None:
            q.soft_scale.times = t


def scales_of(net):
    """The scales that are learned as such, which have to stay positive."""
    layers = [
        m.weight_quantizer for m in quant_layers(net).values() if m.weight_quantizer is not None
    ]
    return [q.scale for q in [*layers, *input_quantizers(net).values()] if q.scale.requires_grad]


def finish(net, times):
    """-> (the trained network hardened, with a table of scales at the sampler's network times (S,)
    if it has functions of time; those functions, named as in quant.tdq.functions_of). It is on
    the CPU."""
    net = net.cpu()
    # any one: all that has functions gets its table from them below
    set_times(net, torch.zeros(1))
    for module in [*quant_layers(net).values(), *input_quantizers(net).values()]:
        module.harden()
    functions = functions_of(net)
    return (retabulated(net, functions, times) if functions else net), functions

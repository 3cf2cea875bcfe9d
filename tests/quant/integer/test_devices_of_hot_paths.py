"""What runs at every step of sampling stays on its device, told without a GPU: no tensor is made on
the CPU, and what is brought over or waited for is in a list here, with its reason."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from integer_nets import NETWORKS, arguments, hardened
from played_device import DEVICE, PlayedDevice
from tiny import SHAPE, normal

from ddim.sampler import SAMPLERS, STOCHASTIC, num_evaluations
from ddim.schedule import make_schedule
from ldm.conditioning import ClassEmbedder
from models.condition import build_condition
from models.diffusion import DiffusionModel
from models.sampling import Sampling, denoise
from quant.integer import glue
from quant.integer.lower import lower
from quant.network import Bypass, Correction, in_channels_last

ALL = {"match": "*", "weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}
WAYS = {
    "balanced": [ALL | {"balance": True}],
    "channels": [ALL, {"role": "conv1", "input": {"bits": 8, "per": "channel"}}],
    "weights only": [ALL, {"role": ["conv1", "q", "qkv"], "input": {"bits": 32}}],
    "logarithms": [ALL, {"kind": "matmul", "role": "probs", "input": {"grid": "log2"}}],
    "heads": [ALL, {"kind": "matmul", "role": ["q", "k"], "input": {"bits": 8, "per": "head"}}],
}
TIMES = (300, 600)  # boundaries
WIDTHS = {"role": "conv1", "input": {"per": "channel", "segment_bits": [8, 6, 3]}}
STEPS = 4


class Definition:
    """An engine for any device: products as they are defined."""

    largest, slow_zero_points = 128, False

    def conv(self, weight, stride, padding, dilation):
        def product(codes, zero_point, scale, bias):
            maps = codes.contiguous(memory_format=torch.channels_last).float() - zero_point
            sums = F.conv2d(maps, weight.float(), None, stride, padding, dilation)
            out = sums * scale[:, None, None]
            return out if bias is None else out + bias[:, None, None]

        return product

    def linear(self, weight):
        def product(codes, zero_point, scale, bias):
            out = F.linear(codes.float() - zero_point, weight.float()) * scale
            return out if bias is None else out + bias

        return product


def simulated(net, _):
    return net


def on_integers(net, given):
    return lower(net, [a[:1] for a in given], Definition(), glue)


def brought(tensors):
    return [tensor.to(DEVICE) for tensor in tensors]


@pytest.mark.parametrize("made", [simulated, on_integers])
@pytest.mark.parametrize(
    "name, rules, boundaries",
    [(name, [ALL], TIMES) for name in NETWORKS]
    + [("pixel", [ALL], ())]
    + [("latent", rules, ()) for rules in WAYS.values()]
    + [("pixel", [ALL, WIDTHS], TIMES)],
)
def test_a_forward_pass_stays_on_its_device(name, rules, boundaries, made, tmp_path):
    """It asks for the time segment, once, and the answer has the bits of the CPU."""
    net = in_channels_last(hardened(name, tmp_path, rules, boundaries=boundaries))
    given = arguments(name)
    expected = net(*given)
    with PlayedDevice() as gpu, torch.no_grad():
        there, given = made(copy.deepcopy(net).to(DEVICE), brought(given)), brought(given)
        gpu.forget()
        answer = there(*given)
    assert torch.equal(answer.held, expected)
    asked = {"quant/timeline.py: set_time": 1} if boundaries else {}
    assert (gpu.made, gpu.moved, gpu.read) == ({}, asked, {})


def guided_model(net):
    """Around a network that takes contexts; classes, the last of which stands for none."""
    width, device = NETWORKS["text"]["context_dim"], next(net.parameters()).device
    embedder = ClassEmbedder(n_classes=3, embed_dim=width).requires_grad_(False)
    embedder.embedding.weight.copy_(normal(3, width))
    embedder.to(device)
    condition = build_condition(net, embedder, {}, {"null_class": 2})
    more = {"condition": condition, "guidance": 2.0}
    return DiffusionModel("tiny", net, make_schedule(), SHAPE, "", **more)


def allowed(sampler, calls):
    """What is brought over or waited for, and how often, in one run with `calls` evaluations."""
    draws = 1 + STEPS * (sampler in STOCHASTIC)
    moved = {
        "base/seeds.py: draw": draws,  # noise is drawn on the CPU, so that it is the same anywhere
        "models/condition.py: embed": 2,  # the classes of the images, and the one for none
        "quant/timeline.py: set_time": calls,  # as above
    }
    read = {
        "models/sampling.py: denoise": 1,  # whether the images are finite
        "quant/network.py: entries": calls,  # a time without statistics is refused
    }
    if sampler in STOCHASTIC:  # which add as much less noise as was measured
        read["quant/network.py: entries"] += STEPS
        read["quant/network.py: noise_variance"] = moved["quant/network.py: noise_variance"] = STEPS
    # on the CPU, beside the noise: numbers, which reach a GPU with the kernel that takes them
    made = {"base/seeds.py: <listcomp>", "ddim/sampler.py: noise_to_add"}
    return made, moved, read


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampling_run_waits_for_little(sampler, tmp_path):
    """Guided, on integers, with a bypass, a correction and noise."""
    net = in_channels_last(hardened("text", tmp_path, [ALL], boundaries=TIMES))
    net.bypass, net.correction = Bypass(net.timeline, 3, 3), Correction(torch.arange(1000), 3)
    net.bypass.gain.fill_(0.1)
    net.correction.variance.fill_(0.01)
    skip, eta = ("uniform", 1.0) if sampler in STOCHASTIC else ("time_uniform", 0.0)
    if sampler == "plms":
        skip = "uniform"
    sampling = Sampling(sampler, STEPS, skip, eta, batch_size=2)
    with torch.no_grad():
        expected = denoise(guided_model(net), range(2), sampling)
    with PlayedDevice() as gpu, torch.no_grad():
        there, given = copy.deepcopy(net).to(DEVICE), brought(arguments("text"))
        model = guided_model(on_integers(there, given))
        gpu.forget()
        x = denoise(model, range(2), sampling)
    assert torch.equal(x.held, expected)
    calls = num_evaluations(sampler, sampling.sequence(model.schedule))
    made, moved, read = allowed(sampler, calls)
    assert set(gpu.made) <= made
    assert gpu.moved <= Counter(moved) and gpu.read <= Counter(read), (gpu.moved, gpu.read)

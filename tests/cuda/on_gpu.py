"""Shared by the tests that need a GPU: their mark, small runs on either device, what of a network
has to be the same on both and what may differ."""

from functools import partial

import pytest
import torch
from conftest import randomize
from PIL import Image
from pipeline import NETWORK, UNET, files, write_model

from base.files import PROJECT
from base.hooks import watching
from base.network import batch_of
from models.zoo import build_network
from quant.layers import QuantLayer, QuantMatmul, QuantOperand
from quant.network import core_of, modules_of
from tinydm.stages import calibrate, quantize

CPU, GPU = torch.device("cpu"), torch.device("cuda")
NEEDS_GPU = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LATENT = {"channel_mult": [1], "attention_resolutions": [1], "num_head_channels": 16}
NETWORKS = {"pixel": NETWORK, "latent": UNET | LATENT}
WORDS = [
    "sampling.steps=8",
    "sampling.num=4",
    "sampling.batch_size=4",
    "calibration.steps=8",
    "calibration.images=4",
    "effort.weight_iters=2",
    "effort.input_iters=2",
    "effort.batch_size=4",
    "effort.dtype=fp32",  # which rounds otherwise on every device
]
METHODS = sorted(path.stem for path in (PROJECT / "configs/method").glob("*.yaml"))
TIMES = 30.0, 500.0, 900.0
EXACT = 2**24  # sums of integers below it are exact in float32, in any order
CLOSE = 1e-5  # of the largest value: float32 kernels add up in another order
# Of what quantization does to an answer: in between, floats differ in their last bits, and a value
# next to the border of two codes may fall to the other side. On a CPU as AVX2 and as AVX-512, whose
# floats differ likewise, no method's network showed more than 5e-5.
SAME_FILE = 0.1


def small_model(kind, folder):
    """A model YAML with random weights and a few images beside it."""
    network, data = NETWORKS[kind], folder / "data/one"
    data.mkdir(parents=True)
    for i in range(6):
        Image.new("RGB", [network["image_size"]] * 2, (40 * i, 255 - 40 * i, 90)).save(
            data / f"{i}.png"
        )
    schedule = {"kind": "linear", "timesteps": 1000}
    content = {
        "network": network,
        "schedule": schedule,
        "sampling": {"skip": "uniform", "eta": 1.0},
    }
    return write_model(folder, kind, content, randomize(build_network(**network)).state_dict())


def calibrated(model, out, method, device, *words, bits="w4a4"):
    """A run folder with its calibration set."""
    given = [*files(model, bits, method), *WORDS, f"device={device.type}", f"out={out}", *words]
    if method == "i2n":
        given.append(f"calibration.data={model.parent / 'data'}")
    calibrate.run(given)
    return out


def quantized(*given, **options):
    """One that is quantized too; the path of its file."""
    out = calibrated(*given, **options)
    quantize.run([str(out)])
    return out / "quantized.safetensors"


def arguments(kind, t, device=CPU):
    """Of a network of NETWORKS: noise for three samples, and one time or one for each."""
    size = NETWORKS[kind]["image_size"]
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))
    return x.to(device), (torch.tensor(t) if isinstance(t, tuple) else batch_of(t, x)).to(device)


@torch.no_grad()
def inputs_of(net, given):
    """Name -> arguments of every quantized layer, product and operand in one forward pass."""
    found = {}

    def note(name, _, inputs):
        found[name] = inputs

    kinds = QuantLayer, QuantMatmul, QuantOperand
    names = [name for name, m in modules_of(net).items() if isinstance(m, kinds)]
    with watching(core_of(net), {name: partial(note, name) for name in names}, before=True):
        net(*given)
    return found


@torch.no_grad()
def is_exact(module, inputs):
    """Whether a quantized module multiplies integers whose sums float32 holds."""
    if isinstance(module, QuantOperand):
        return True
    if isinstance(module, QuantMatmul):
        pairs = (module.a_quantizer, inputs[0]), (module.b_quantizer, inputs[1])
        if any(q is None or q.spec.grid != "uniform" for q, _ in pairs):
            return False
        a, b = (q.codes(x).abs() for q, x in pairs)
        return bool((a @ b).max() < EXACT)
    codes, scales = module.quantize_input(module.balanced_input(*inputs))
    if scales is None or module.weight_int is None:
        return False
    return bool(module.operation(codes.abs(), module.weight_in_use().abs(), None).max() < EXACT)


@torch.no_grad()
def otherwise(cpu_net, gpu_net, given, names=None):
    """Names of the quantized modules (or those of `names`) that answer the inputs of the network on
    the CPU otherwise on the GPU: in any bit where they multiply integers, by more than CLOSE where
    they do not."""
    inputs, modules, there = inputs_of(cpu_net, given), modules_of(cpu_net), modules_of(gpu_net)
    cpu_net.timeline.set_time(given[1])
    gpu_net.timeline.set_time(given[1].to(GPU))
    different = []
    for name in inputs if names is None else names:
        expected = modules[name](*inputs[name])
        found = there[name](*map(on_gpu, inputs[name])).cpu()
        exact = is_exact(modules[name], inputs[name])
        bound = 0.0 if exact else CLOSE * float(expected.abs().max())
        if not float((found - expected).abs().max()) <= bound:
            different.append(f"{name} ({'integers' if exact else 'floats'})")
    return different


def on_gpu(x):
    """Maps as the sampler holds them there."""
    x = x.to(GPU)
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


@torch.no_grad()
def answer_of(net, given):
    """On the CPU, of a network on any device."""
    device = next(net.parameters()).device
    return net(*(a.to(device) for a in given)).cpu()


def apart(a, b, reference):
    """|a - b| / |b - reference|, Euclidean: in units of what quantization does to the answer."""
    return float((a - b).double().norm() / (b - reference).double().norm())


def psnr(a, b):
    """Of images uint8, in dB."""
    return float(10 * (255**2 / (a.double() - b.double()).square().mean()).log10())

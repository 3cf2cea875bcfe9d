"""What is measured against full precision: a word for each, what it is called in tables, and how it
is made. A maker raises ValueError with the reason where its kind cannot run here."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from base.devices import computes_bfloat16
from models.sampling import Sampling, denoise
from quant.export.files import write_onnx
from quant.export.packages import needed
from quant.export.runtimes import OnnxRuntime, OpenVINO
from quant.integer.select import integer_net
from tinydm.benchmark.harness import Call
from tinydm.benchmark.networks import Network
from tinydm.benchmark.published import published_net

BASE = "fp32"
TITLES = {
    BASE: "fp32 eager NCHW",
    "channels_last": "fp32 eager channels_last",
    "bf16": "bf16 autocast channels_last",
    "fp16": "fp16 compiled channels_last",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "published": "simulated as published",
    "simulated": "simulated",
    "integer": "integer, eager glue",
    "compiled": "integer, compiled glue",
}
ON_GPU, ON_CPU = ("fp16",), ("onnxruntime", "openvino")  # what is measured there alone
OURS = "simulated", "integer", "compiled"
SAMPLED = (BASE, *OURS)  # what whole sampling runs are timed of


class Case(NamedTuple):
    """What a variant runs on."""

    network: Network
    arguments: tuple[torch.Tensor, ...]
    threads: int

    @property
    def device(self) -> torch.device:
        return self.arguments[0].device


def keys_of(bits: Sequence[str], device: torch.device, only: Sequence[str] = ()) -> list[str]:
    """The variants for a device in the order of TITLES, "WORD" or "WORD BITS"; with `only`, those
    of these words and BASE. Widths after the first are ours alone."""
    keys, elsewhere = [], ON_CPU if device.type == "cuda" else ON_GPU
    for word in TITLES:
        if word in elsewhere or only and word not in (BASE, *only):
            continue
        if word not in ("published", *OURS):
            keys.append(word)
        if word in (*ON_CPU, "published"):
            keys.append(f"{word} {bits[0]}")
        if word in OURS:
            keys += [f"{word} {one}" for one in bits]
    return keys


def title(key: str) -> str:
    """What a variant is called in tables."""
    word, _, bits = key.partition(" ")
    return f"{TITLES[word]} {'fp32' if word in ON_CPU and not bits else bits.upper()}".strip()


def forward_call(key: str, case: Case) -> Call:
    """One forward pass. Raises ValueError where the variant cannot run here."""
    run = _make(key, case)
    return lambda: run(*case.arguments)


def sampling_call(key: str, case: Case, steps: int) -> Call:
    """A whole run of the DDIM sampler over so many steps, without the first stage."""
    run, model = _make(key, case), case.network.model()
    batch, condition = range(len(case.arguments[0])), case.arguments[2:]
    sampling = Sampling(sampler="ddim", steps=steps, skip="uniform", batch_size=len(batch))
    return lambda: denoise(model, batch, sampling, eps=lambda x, t, _: run(x, t, *condition))


def _make(key, case):
    word, _, bits = key.partition(" ")
    return MAKERS[word](case, bits)


def channels_last(net: nn.Module) -> nn.Module:
    """A copy whose maps lie in memory channel by channel of one pixel."""
    return copy.deepcopy(net).to(memory_format=torch.channels_last)


def _float(case, _):
    return case.network.net


def _channels_last(case, _):
    return case.network.keep("channels_last", lambda: channels_last(case.network.net))


def _bf16(case, _):
    if not computes_bfloat16(case.device):
        raise ValueError("this device emulates bfloat16, several times slower than fp32")
    net = _channels_last(case, _)

    def run(*arguments):
        with torch.autocast(case.device.type, torch.bfloat16):
            return net(*arguments)

    return run


def _fp16(case, _):
    net = torch.compile(channels_last(case.network.net).half())
    halves = [part.half() if part.is_floating_point() else part for part in case.arguments]
    return lambda *_: net(*halves)


def _published(case, bits):
    return published_net(case.network.net, case.network.quantized(bits))


def _simulated(case, bits):
    return case.network.quantized(bits)


def _integer(case, bits):
    return _on_integers(case, bits, compiled=False)


def _compiled(case, bits):
    return _on_integers(case, bits, compiled=True)


def _on_integers(case, bits, compiled):
    net, arguments = case.network.quantized(bits), case.arguments
    make = partial(integer_net, net, arguments, compiled=compiled)
    return case.network.keep((bits, compiled), make)


def _onnxruntime(case, bits):
    return OnnxRuntime(_exported(case, bits, OnnxRuntime.package), case.threads)


def _openvino(case, bits):
    return OpenVINO(_exported(case, bits, OpenVINO.package), case.threads)


def _exported(case, bits, package):
    """An ONNX file, made once, of the float network for this batch, or of the quantized one."""
    needed(package, "onnx", "onnxscript")
    network, arguments = case.network, case.arguments
    if not bits:
        return network.written(f"fp32-{len(arguments[0])}", lambda path: _write(path, case))
    pair = network.arguments(2)
    return network.written(bits, lambda path: write_onnx(path, network.quantized(bits), pair))


def _write(path, case):
    program = torch.onnx.export(case.network.net, case.arguments, dynamo=True, verbose=False)
    program.save(path, external_data=True)


MAKERS: dict[str, Callable] = {
    BASE: _float,
    "channels_last": _channels_last,
    "bf16": _bf16,
    "fp16": _fp16,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "published": _published,
    "simulated": _simulated,
    "integer": _integer,
    "compiled": _compiled,
}

"""Write the quantized network of a run for another runtime, and hold it to the definition:

    python scripts/export.py RUN to=onnx|openvino [batch=8]        (or: RUN --to onnx)

onnx       RUN/onnx/network.onnx, with QuantizeLinear and DequantizeLinear around its products
openvino   RUN/openvino/network.xml and .bin, the same graph in OpenVINO's own format

Inputs are x, t and, where the network has a condition, cond; the output is called answer; a batch
may have any size. Guidance, the correction of the noise and the first stage are the sampler's and
stay there. export.json beside the file says what was found of each runtime that is installed: how
far its answers lie from those of the definition, on `batch` samples of noise at steps from first to
last; which products ran on integers; the speed, measured in turn with full precision and with the
simulation. Needs: pip install 'tinydm[export]'"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from base.config import one_folder, take_words
from base.errors import unknown_word
from base.files import write_text
from models.zoo import build_network
from quant.checkpoint import load_quantized
from quant.export.files import write_onnx, write_openvino
from quant.export.packages import is_here, needed
from quant.export.runtimes import OnnxRuntime, OpenVINO
from tinydm.benchmark.harness import busy_elsewhere, measure, times_faster
from tinydm.benchmark.machine import label, machine
from tinydm.recipe import network_times
from tinydm.run_folder import Run, open_run

# format -> what reads it, the first of which must be there
READERS = {"onnx": (OnnxRuntime, OpenVINO), "openvino": (OpenVINO,)}
FILES = {"onnx": "network.onnx", "openvino": "network.xml"}
FLAGS = ("to", "batch")
ROUNDS, SECONDS = 15, 20.0  # of the measurement of speed
FEWEST = 3  # rounds in which the machine was ours, else all count and that is said
FLOAT, SIMULATED = "full precision", "simulated"


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    folder, words = one_folder(flags_as_words(arguments))
    choice, words = take_words(words, {"to": "", "batch": "8"})
    to, batch = choice["to"], choice["batch"]
    if to not in FILES:
        raise ValueError(unknown_word(f"to='{to}' is no format to export to", to, FILES))
    if not batch.isdecimal() or int(batch) < 2:
        raise ValueError(f"batch={batch} is no number of samples to compare; give 2 or more")
    print(export(open_run(folder, words), to, int(batch)))


def flags_as_words(arguments: Iterable[str]) -> list[str]:
    """`--to onnx` and `--to=onnx` as to=onnx."""
    words = []
    for argument in arguments:
        if words and words[-1] in {f"--{flag}" for flag in FLAGS}:
            words[-1] = f"{words[-1].removeprefix('--')}={argument}"
        else:
            is_flag = argument.startswith(tuple(f"--{flag}=" for flag in FLAGS))
            words.append(argument.removeprefix("--") if is_flag else argument)
    return words


@torch.no_grad()
def export(run: Run, to: str, batch: int = 8) -> str:
    """Writes the network of a run in a format and checks it; returns what was found as text."""
    needed("onnx", "onnxscript", READERS[to][0].package)
    net = load_quantized(run.need("quantized.safetensors", "quantize"), build_network)
    original, arguments = copy.deepcopy(run.model.net).cpu(), inputs_of(run, batch)
    path = run.path(to) / FILES[to]
    path.parent.mkdir(parents=True, exist_ok=True)
    with run.stage(f"export {to}"):
        floating = write(path, net, arguments, to)
        threads = torch.get_num_threads()
        readers = [reader for reader in READERS[to] if is_here(reader.package)]
        sessions = {reader.package: reader(path, threads) for reader in readers}
        facts = {
            "file": path.name,
            "bytes": sum(part.stat().st_size for part in path.parent.glob("network.*")),
            "in floating point": floating,
            "without": "the correction of the noise" if net.correction is not None else "",
            "machine": machine(torch.device("cpu"), threads),
            "batch": batch,
            **compared(net, original, sessions, arguments),
        }
    write_text(path.with_name("export.json"), json.dumps(facts, indent=1) + "\n")
    return told(path, facts)


def write(
    path: Path, net: nn.Module, arguments: tuple[torch.Tensor, ...], to: str
) -> dict[str, list[str]]:
    """Writes the file; returns what quant.export.files.write_onnx does."""
    if to == "onnx":
        return write_onnx(path, net, arguments)
    with TemporaryDirectory() as folder:
        floating = write_onnx(Path(folder, FILES["onnx"]), net, arguments)
        write_openvino(path, Path(folder, FILES["onnx"]))
    return floating


def inputs_of(run: Run, batch: int) -> tuple[torch.Tensor, ...]:
    """What a sampler calls the network with: noise of seed 0, steps from first to last, and what
    the first images of seed 0 show."""
    model, times = run.model, network_times(run.config)
    chosen = torch.linspace(0, len(times) - 1, batch).round().long()
    arguments = [model.noise(0, range(batch)).draw(), torch.tensor(times).float()[chosen]]
    labels = model.labels(0, range(batch))
    return tuple(part.cpu() for part in [*arguments, labels] if part is not None)


def compared(
    net: nn.Module, original: nn.Module, sessions: dict[str, Any], arguments: tuple
) -> dict[str, Any]:
    """Answers and speed of `sessions` {package: function} beside those of the simulated network and
    of the original, in numbers."""
    expected = net(*arguments)
    calls = {FLOAT: original, SIMULATED: net} | sessions
    timed = {name: lambda call=call: call(*arguments) for name, call in calls.items()}
    timing = measure(timed, rounds=ROUNDS, budget=SECONDS, busy_elsewhere=busy_elsewhere)
    is_clean = timing.num_clean >= FEWEST
    seconds = timing.clean() if is_clean else timing.seconds
    faster = {
        name: {base: times_faster(seconds[base], seconds[name]) for base in (FLOAT, SIMULATED)}
        for name in sessions
    }
    return {
        "quantization error": difference(expected, original(*arguments)),
        "rounds": timing.num_clean if is_clean else len(timing.others),
        "machine was busy": not is_clean,
        "runtimes": {
            package: {
                "version": version(package),
                "difference": difference(session(*arguments), expected),
                "products": session.products(*arguments),
                "times faster than": faster[package],
            }
            for package, session in sessions.items()
        },
    }


def difference(answer: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Largest and root mean square difference, by the standard deviation of `expected`."""
    apart = (answer - expected) / expected.std()
    return {"largest": float(apart.abs().max()), "rms": float(apart.square().mean().sqrt())}


def told(path: Path, facts: dict[str, Any]) -> str:
    """What was found, as text."""
    lines = [f"export: {path}, {facts['bytes']:,} bytes"]
    for reason, names in facts["in floating point"].items():
        lines.append(f"  in floating point because of {reason}: {len(names)}, first {names[0]}")
    if facts["without"]:
        lines.append(f"  without {facts['without']}, which is the sampler's")
    for package, found in facts["runtimes"].items():
        apart = found["difference"]
        counts = {kind: sum(of.values()) for kind, of in found["products"].items()}
        ratios = [f"{ratio:.2f} x {base}" for base, ratio in found["times faster than"].items()]
        lines += [
            f"  {package} {found['version']}: {counts['integer']} of {sum(counts.values())} "
            f"products on integers; speed {', '.join(ratios)}",
            f"    differs from the definition by {apart['rms']:.1e} rms, {apart['largest']:.1e} at "
            "most, of the answers' deviation",
        ]
    busy = ", the machine was busy" if facts["machine was busy"] else ""
    by_bits = facts["quantization error"]["rms"]
    lines += [
        f"  quantization itself changes the answers by {by_bits:.1e} rms",
        f"  measured at batch {facts['batch']} in {facts['rounds']} rounds{busy}; "
        f"{label(facts['machine'])}",
    ]
    return "\n".join(lines)

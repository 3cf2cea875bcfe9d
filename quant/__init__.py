"""Quantization of any PyTorch network that is called as net(x, t) or net(x, t, cond), x (N, ...),
t (N,) the times of its samples.

    qnet = quant.convert(net, [{"weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}])
    with quant.observing(qnet):
        qnet(x, t)
    quant.fit(qnet)
    quant.save(qnet, "q.safetensors")
    again = quant.load("q.safetensors", net)

`run_passes` does in place of `fit` what a method's YAML lists. This room knows tensors and modules;
it knows no data set, no pretrained model and no script."""

import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from quant.calibration.dataset import CalibrationSet
from quant.checkpoint import load, save
from quant.convert import convert
from quant.network import QuantizedNet, fit, observing
from quant.timeline import Timeline

__all__ = [
    "CalibrationSet",
    "QuantizedNet",
    "Timeline",
    "convert",
    "fit",
    "load",
    "observing",
    "run_passes",
    "save",
]


class _LoneNetwork:
    """Stands for a model where there is a network alone: to ask for more is a ValueError."""

    def __init__(self, net, shape):
        self.net, self.shape = net, shape

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)  # what copies and pickles ask every object
        _missing(f"the model's {name}")


def _missing(what):
    raise ValueError(
        f"a pass in this list needs {what}, which a network alone does not have; give "
        "quant.run_passes a model=, trajectory= and differentiable= (see quant/passes/job.py), or "
        "leave that pass out"
    )


def run_passes(
    qnet: QuantizedNet,
    passes: list[str | dict[str, Any]],
    net: nn.Module,
    calibration: CalibrationSet,
    *,
    model: Any = None,
    resume: Path | str | None = None,
    **options: Any,
) -> tuple[QuantizedNet, list[dict[str, Any]]]:
    """Run passes, named as in a method's YAML (the files of quant/passes), on `qnet`, the converted
    `net`, with what it is called with on the way from noise to image -> (the quantized network,
    hardened, which may be another one; what each pass found). Raises ValueError in one sentence for
    passes or options that do not work.

    `model` is what few passes want beyond the network (quant.passes.job.Model), whose absence
    those say by a ValueError; `resume` a folder
    that keeps finished parts of a pass that is killed; `options` are those of quant.passes.job.Job,
    for example seed.

    >>> samples = quant.CalibrationSet(x, t)
    >>> qnet, facts = quant.run_passes(quant.convert(net, rules), ["fit_ranges"], net, samples)
    >>> facts[0]
    {'pass': 'fit_ranges', 'weights': 3, 'inputs': 3}
    """
    from quant.graph import trace
    from quant.passes import job as job_module
    from quant.passes import run

    sources = {
        "trajectory": lambda *_: _missing("trajectories of the model"),
        "differentiable": lambda *_: _missing("images with gradients"),
    }
    with tempfile.TemporaryDirectory() as folder:
        job = job_module.Job(
            model=model or _LoneNetwork(net, tuple(calibration.x.shape[1:])),
            net=qnet,
            calibration=calibration,
            graph=trace(net, calibration.arguments(slice(0, 1))),
            resume_folder=Path(resume or folder),
            rules=qnet.recipe["rules"],
            **sources | options,
        )
        facts = run.run_passes(job, passes)
    job.net.recipe = {"rules": job.rules}
    return job.net, facts

"""What the tests of quant/ share: rules, calibration samples and jobs for the tiny network."""

from types import SimpleNamespace

import torch
from torch import nn

from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.graph import trace
from quant.network import modules_of
from quant.observer import refit
from quant.passes.job import Job
from quant.passes.run import run_passes
from quant.reconstruction.capture import Stream
from quant.timeline import Timeline

SHAPE = (3, 8, 8)
EXAMPLE = torch.empty(1, *SHAPE), torch.zeros(1)  # arguments of the tiny network
WEIGHT_8 = {"bits": 8, "per": "channel"}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rules(weight, inputs):
    """Weights per channel, inputs per tensor."""
    return [{"weight": {"bits": weight, "per": "channel"}, "input": {"bits": inputs}}]


def samples(num=10, seed=0, context=0):
    """Calibration samples at steps that are spread over 0..999, as if of one trajectory, with
    contexts of 4 tokens if they have features."""
    cond = normal(3, 4, context, seed=seed + 1) if context else None
    return CalibrationSet(
        normal(num, *SHAPE, seed=seed),
        torch.linspace(999, 0, num).round(),
        cond,
        torch.arange(num) % 3 if context else None,
        torch.zeros(num, dtype=torch.long),
    )


def make_job(net, folder, wanted, *, num=10, boundaries=(), context=0, **more):
    calibration = samples(num, context=context)
    return Job(
        model=SimpleNamespace(net=net, shape=SHAPE),
        net=convert(net, wanted, Timeline(boundaries)),
        calibration=calibration,
        graph=trace(net, calibration.arguments(slice(0, 1))),
        resume_folder=folder,
        rules=wanted,
        **{"log": lambda line: None} | more,
    )


def quantized(net, folder, wanted, *, passes=({"fit_ranges": {}},), **more):
    """The hardened copy of `net`."""
    job = make_job(net, folder, wanted, **more)
    run_passes(job, passes)
    return job.net


def facts_of(name, facts):
    """What a pass found, without the row that closes it."""
    found = [fact for fact in facts if fact["pass"] == name]
    return [fact for fact in found if fact.keys() - {"pass", "seconds", "segment"}]


def fit(module, *inputs):
    """Ranges of a lone quantized layer or product from one batch of its inputs."""
    if getattr(module, "weight_quantizer", None) is not None:
        module.fit_weight()
    refit(module, *inputs)
    return module


class Wired(nn.Module):
    """a -> b -> c, d reads a and c, e reads b; the result reads d and e."""

    def __init__(self):
        super().__init__()
        for name in "abcde":
            setattr(self, name, nn.Linear(3, 3))

    def forward(self, x, t):
        a = self.a(x)
        b = self.b(a).relu()
        c = self.c(b * 2)
        d = self.d(a + c)
        return d + self.e(b)


@torch.no_grad()
def capture_whole(net, unit, calibration, batch_size):
    """Arguments and output of one unit from complete forward passes: what a stream must reproduce
    bit for bit."""
    module, calls = modules_of(net)[unit], []
    hook = module.register_forward_hook(lambda _, arguments, out: calls.append((arguments, out)))
    try:
        for batch in calibration.batches(batch_size):
            net(*batch)
    finally:
        hook.remove()
    return [torch.cat(parts) for parts in zip(*(a for a, _ in calls))], torch.cat(
        [out for _, out in calls]
    )


def walk(nets, graph, calibration, store, keep=None, batch_size=4):
    """Yields (unit, inputs and output of each network) along whole networks, as `reconstruct` goes
    through two."""
    options = {"batch_size": batch_size, "store": store, "keep": keep}
    streams = [Stream(net, graph, calibration, **options) for net in nets]
    for unit in graph.units:
        inputs, found = [stream.inputs(unit) for stream in streams], []
        for stream, own in zip(streams, inputs):
            found.append((own, stream.advance(unit, own)))
            stream.free(own)
        yield unit, found

"""Ranges are those of the full-precision network, fitted to as many samples as were asked for."""

import pytest
import torch
from tiny import make_job, rules

from quant import observer
from quant.network import input_quantizers, quant_layers
from quant.passes.fit_ranges import fit_ranges
from quant.timeline import Timeline


def test_ranges_that_cannot_be_fitted_leave_the_switches_on(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(4, 8), num=2, boundaries=[300, 700])
    with pytest.raises(ValueError, match="hold no sample in time segment 1 of 3"):
        fit_ranges(job)
    assert all(q.enabled for q in input_quantizers(job.net).values()) and not job.net.observers
    assert all(layer.weight_quantizer.enabled for layer in quant_layers(job.net).values())


@pytest.mark.parametrize("batch_size", [3, 10, 64])
def test_ranges_are_those_of_the_full_precision_network(tiny_net, tmp_path, batch_size):
    """With samples to spare for all values, min-max does not depend on batches or on other
    quantizers."""
    job, seen = make_job(tiny_net, tmp_path, rules(2, 8)), {}
    fit_ranges(job, batch_size=batch_size)
    for name, module in tiny_net.named_modules():
        if name in quant_layers(job.net):
            module.register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0]))
    with torch.no_grad():
        tiny_net(job.calibration.x, job.calibration.t)
    for name, layer in quant_layers(job.net).items():
        parts = seen[name].split(layer.parts, dim=1) if len(layer.parts) > 1 else [seen[name]]
        expected = [
            (float(p.max().clamp(min=0)) - float(p.min().clamp(max=0))) / 255 for p in parts
        ]
        assert layer.input_quantizer.scale[0].tolist() == pytest.approx(expected, rel=1e-4), name
    assert all(q.enabled for q in input_quantizers(job.net).values()) and not job.net.observers


def test_only_so_many_samples_are_used(tiny_net, tmp_path):
    jobs = [make_job(tiny_net, tmp_path, rules(8, 8)) for _ in range(2)]
    jobs[1].calibration = jobs[1].calibration.subset(4, Timeline(), jobs[1].seed)
    fit_ranges(jobs[0], num_samples=4)
    fit_ranges(jobs[1])
    for a, b in zip(*(input_quantizers(job.net).values() for job in jobs)):
        assert torch.equal(a.scale, b.scale)


def test_a_search_sees_so_many_values_and_the_extremes(tiny_net, tmp_path, monkeypatch):
    """32 values of 8 samples: 4 of each, and the extremes of all; weights are read whole."""
    counts, search = [], observer.find_range
    monkeypatch.setattr(
        observer,
        "find_range",
        lambda name, x, *a, **b: [counts.append(x.shape), search(name, x, *a, **b)][1],
    )
    job = make_job(tiny_net, tmp_path, rules(32, 8), num=8)
    fit_ranges(job, num_values=32)
    assert {size for _, size in counts} == {4 * 8 + 2}
    whole = make_job(tiny_net, tmp_path, rules(32, 8), num=8)
    fit_ranges(whole)
    for few, all_of_them in zip(*(input_quantizers(j.net).values() for j in (job, whole))):
        assert torch.equal(few.scale, all_of_them.scale)  # minmax goes by the extremes


def test_facts_of_fitting(tiny_net, tmp_path):
    job = make_job(tiny_net, tmp_path, rules(8, 8))
    assert fit_ranges(job) == [
        {
            "pass": "fit_ranges",
            "weights": len(quant_layers(job.net)),
            "inputs": len(input_quantizers(job.net)),
        }
    ]

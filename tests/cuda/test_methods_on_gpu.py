"""Every method's YAML on tiny networks: it quantizes on the GPU what it quantizes on the CPU, and a
file computes the same on both."""

import shutil

import pytest
from on_gpu import (
    CPU,
    GPU,
    METHODS,
    NEEDS_GPU,
    NETWORKS,
    SAME_FILE,
    TIMES,
    answer_of,
    apart,
    arguments,
    calibrated,
    otherwise,
    small_model,
)

import tinydm
from base.files import load_tensors
from quant.integer.select import integer_net
from quant.network import in_channels_last
from tinydm.stages import quantize, sample

pytestmark = NEEDS_GPU
FUSED = "edadm", "multimodel", "tfmq", "tinydm"  # what treats attention of this kind apart
WORSE = 1.5  # of errors to full precision; 1.13 at most between AVX2 and AVX-512, of 23 methods
FLOATS = ["apqdm_as_released"]  # what it quantizes has a scale for every channel


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: small_model(kind, tmp_path_factory.mktemp(kind)) for kind in NETWORKS}


@pytest.mark.parametrize(
    "kind, method",
    [("pixel", method) for method in METHODS] + [("latent", method) for method in FUSED],
)
def test_method_on_a_gpu(models, kind, method, tmp_path):
    model = models[kind]
    runs = {d: calibrated(model, tmp_path / str(d) / "run", method, d) for d in (CPU, GPU)}
    # of one calibration set: trajectories drift apart, and what is picked from them may too
    shutil.copy(runs[CPU] / "calibration.safetensors", runs[GPU])
    for run in runs.values():
        quantize.run([str(run)])
    sample.run([str(runs[GPU]), "precision=simulated"])
    assert len(list((runs[GPU] / "samples").glob("*.png"))) == 4

    files = {device: run / "quantized.safetensors" for device, run in runs.items()}
    kinds = [
        {name: (value.shape, value.dtype) for name, value in load_tensors(file)[0].items()}
        for file in files.values()
    ]
    assert kinds[0] == kinds[1]
    made_on_cpu, made_on_gpu = (tinydm.load(file, device="cpu").net for file in files.values())
    there = tinydm.load(files[GPU], device=GPU.type).net
    floats = tinydm.load_model(model, device="cpu").net
    errors = {CPU: 0.0, GPU: 0.0}
    for t in TIMES:
        given = arguments(kind, t)
        assert not otherwise(made_on_gpu, there, given)
        full, simulated = answer_of(floats, given), answer_of(made_on_gpu, given)
        assert apart(answer_of(there, given), simulated, full) < SAME_FILE
        errors[CPU] += float((answer_of(made_on_cpu, given) - full).square().sum())
        errors[GPU] += float((simulated - full).square().sum())
    assert errors[GPU] < WORSE**2 * errors[CPU]

    if method not in FLOATS:
        there = in_channels_last(there)
        integer = integer_net(there, arguments(kind, TIMES[0], GPU), compiled=False)
        assert integer.integer_layers
        for t in TIMES:
            given = arguments(kind, t)
            assert not otherwise(made_on_gpu, integer, given, integer.integer_layers)

"""Whole runs on a GPU that is played (tests/played_device.py): every pass brings its tensors
together, and the result is that of the CPU."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, randomize
from pipeline import files, write_model
from played_device import DEVICE, PlayedDevice

from base.files import load_tensors
from models.zoo import build_network
from tinydm.stages import calibrate, quantize, sample

WORDS = [
    "sampling.steps=4",
    "sampling.num=2",
    "sampling.batch_size=2",
    "calibration.steps=4",
    "calibration.images=2",
    "effort.weight_iters=2",
    "effort.input_iters=2",
    "effort.batch_size=4",
    "effort.dtype=fp32",
]


@pytest.fixture
def gpu(monkeypatch):
    """What PyTorch has for a device beside its tensors."""
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": make())
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, DEVICE.type, SimpleNamespace(_initialized=False), raising=False)
    return PlayedDevice()


def run(model, method, out, device):
    """Every stage up to images; the tensors of the quantized file."""
    calibrate.run([*files(model, "w4a4", method), *WORDS, f"device={device}", f"out={out}"])
    quantize.run([str(out)])
    sample.run([str(out), "precision=simulated"])
    return load_tensors(out / "quantized.safetensors")[0]


@pytest.mark.parametrize(
    "method, draws",  # whether it draws on the device, where other numbers come
    [("tfmq", False), ("multimodel", False), ("edadm", True)],
)
def test_a_run_on_another_device(gpu, method, draws, tmp_path):
    state = randomize(build_network(**TINY)).state_dict()
    content = {"network": TINY, "schedule": {}, "sampling": {"skip": "uniform", "eta": 1.0}}
    model = write_model(tmp_path, "tiny", content, state)
    here = run(model, method, tmp_path / "cpu/run", "cpu")
    with gpu:
        there = run(model, method, tmp_path / "gpu/run", DEVICE.type)
    assert len(list((tmp_path / "gpu/run/samples").glob("*.png"))) == 2
    assert here.keys() == there.keys()
    for name, value in here.items():
        assert (value.shape, value.dtype) == (there[name].shape, there[name].dtype)
        if not draws:  # gradients add up in another order
            torch.testing.assert_close(value, there[name], msg=name, rtol=1e-5, atol=1e-6)

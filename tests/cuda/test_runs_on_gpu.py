"""Whole runs on a GPU: what they make does not depend on the device, an interruption or on where
activations wait; what they compute on integers."""

import os

import pytest
import torch
import yaml
from on_gpu import (
    CPU,
    GPU,
    NEEDS_GPU,
    SAME_FILE,
    TIMES,
    answer_of,
    apart,
    arguments,
    calibrated,
    otherwise,
    psnr,
    quantized,
    small_model,
)

import tinydm
from base.devices import exact_arithmetic
from base.files import PROJECT, load_tensors
from models.diffusion import DiffusionModel
from quant.calibration.files import load_calibration
from quant.integer.select import integer_net
from quant.network import in_channels_last
from tinydm.report import command as report
from tinydm.stages import evaluate, quantize, sample
from tinydm.training import train

pytestmark = NEEDS_GPU
KIND, LEARNING = "pixel", "qdiffusion"
PER_STEP = ["segments=per_step"]


@pytest.fixture(autouse=True)
def exact():
    """Float32 as float32, as the stages compute."""
    with exact_arithmetic():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return small_model(KIND, tmp_path_factory.mktemp("model"))


def test_a_run_without_learning_makes_on_the_gpu_what_it_makes_on_the_cpu(model, tmp_path):
    files = {
        device: quantized(model, tmp_path / str(device) / "run", "minmax", device, bits="w4a8")
        for device in (CPU, GPU)
    }
    sets = [load_calibration(file.with_name("calibration.safetensors")) for file in files.values()]
    assert torch.equal(sets[0].t, sets[1].t) and sets[0].x.shape == sets[1].x.shape
    torch.testing.assert_close(sets[0].x, sets[1].x, atol=1e-3, rtol=1e-3)
    here, there = (load_tensors(file)[0] for file in files.values())
    assert here.keys() == there.keys()
    for name, value in here.items():
        if value.dtype == torch.uint8:  # codes of weights; a zero point may round to its neighbour
            most = 0 if name.endswith("weight_codes") else 1
            assert (value.int() - there[name].int()).abs().max() <= most, name
        else:
            torch.testing.assert_close(value, there[name], atol=1e-3, rtol=1e-3, msg=name)

    folder = files[GPU].parent
    for precision in ("float", "simulated"):
        sample.run([str(folder), f"precision={precision}"])
    evaluate.run([str(folder)])
    report.run([str(folder)])
    assert (folder / "report.html").exists()
    on_gpu, on_cpu = (tinydm.load(files[GPU], device=d.type) for d in (GPU, CPU))
    drawn = [m.sample(range(4), precision="simulated").cpu() for m in (on_gpu, on_cpu)]
    assert psnr(*drawn) > 30
    floats = [tinydm.load_model(model, device=d.type).sample(range(4)).cpu() for d in (GPU, CPU)]
    assert (floats[0].int() - floats[1].int()).abs().max() <= 1


def test_scales_for_every_step_are_those_of_the_samples_own_time(model, tmp_path):
    file = quantized(model, tmp_path / "run", "minmax", GPU, *PER_STEP)
    here, there = (tinydm.load(file, device=d.type).net for d in (CPU, GPU))
    assert there.timeline.num_segments == 8
    for t in (*TIMES, TIMES):
        assert not otherwise(here, there, arguments(KIND, t))
    whole = answer_of(there, arguments(KIND, TIMES))
    for row, t in enumerate(TIMES):
        alone = answer_of(there, [a[row : row + 1] for a in arguments(KIND, t)])
        torch.testing.assert_close(alone[0], whole[row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("words", [[], ["effort.dtype=bf16"]])
def test_activations_that_wait_on_disk_change_nothing(model, words, tmp_path):
    made = []
    for name, more in {"memory": "memory_gb=4", "disk": "memory_gb=0"}.items():
        file = quantized(model, tmp_path / name / "run", LEARNING, GPU, *words, more)
        made.append(file.read_bytes())
    assert made[0] == made[1]


def test_an_interrupted_run_ends_in_the_same_bytes(model, tmp_path, monkeypatch):
    whole = quantized(model, tmp_path / "whole" / "run", LEARNING, GPU)
    run = calibrated(model, tmp_path / "killed" / "run", LEARNING, GPU)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        lines = iter([print] * 4 + [die])
        patch.setattr("builtins.print", lambda *given, **how: next(lines)(*given, **how))
        with pytest.raises(KeyboardInterrupt):
            quantize.run([str(run)])
    assert os.listdir(run / "resume/quantize") and not (run / whole.name).exists()
    quantize.run([str(run)])
    assert whole.read_bytes() == (run / whole.name).read_bytes()


def test_a_network_trained_on_the_gpu_computes_the_same_on_the_cpu(model, tmp_path):
    recipe = yaml.safe_load((PROJECT / "configs/train/qat-latent-compact.yaml").read_text())
    recipe |= {"model": str(model), "rules": str(PROJECT / recipe["rules"])}
    recipe |= {"num_images": 12, "batch_size": 4, "steps_per_epoch": 2, "warmup_steps": 2}
    (tmp_path / "qat.yaml").write_text(yaml.safe_dump(recipe))
    words = [f"out={tmp_path / 'run'}", f"data={model.parent / 'data'}", f"device={GPU.type}"]
    train.run([str(tmp_path / "qat.yaml"), *words, "dynamic=true"])
    file = tmp_path / "run/quantized.safetensors"
    here, there = (tinydm.load(file, device=d.type).net for d in (CPU, GPU))
    for t in TIMES:
        assert not otherwise(here, there, arguments(KIND, t))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("words", [[], PER_STEP], ids=["static", "per step"])
def test_integers_give_what_the_simulation_gives(model, words, compiled, tmp_path):
    """Layer by layer to the bit; whole networks as close as float kernels let them be."""
    file = quantized(model, tmp_path / "run", "minmax", GPU, *words, bits="w4a8")
    here, there = (tinydm.load(file, device=d.type) for d in (CPU, GPU))
    floats = tinydm.load_model(model, device="cpu").net
    simulated = in_channels_last(there.net)
    integer = integer_net(simulated, arguments(KIND, TIMES[0], GPU), compiled=compiled)
    for t in (*TIMES, *[TIMES] * bool(words)):
        given = arguments(KIND, t)
        if not compiled and t is not TIMES:
            assert not otherwise(here.net, integer, given, integer.integer_layers)
        wanted = answer_of(simulated, given)
        assert apart(answer_of(integer, given), wanted, answer_of(floats, given)) < SAME_FILE
    assert integer.graphed is None or integer.graphed.trouble == ""
    nets = integer, simulated
    images = [DiffusionModel.sample(there.with_net(net), range(4)).cpu() for net in nets]
    assert psnr(*images) > 30


def test_sampling_on_integers_says_so(model, tmp_path, caplog):
    file = quantized(model, tmp_path / "run", "minmax", GPU, bits="w4a8")
    with caplog.at_level("INFO", "tinydm"):
        images = tinydm.load(file, device=GPU.type).sample(range(4), precision="integer")
    assert images.device.type == GPU.type and "layers on int8" in caplog.text

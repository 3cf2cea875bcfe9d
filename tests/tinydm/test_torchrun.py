"""Two workers by torchrun: the same calibration set and images as one alone, byte for byte; the
same quantized network within rounding; a worker that is killed ends the command, and one goes on
where two were."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from pipeline import NETWORK, WORDS, artefacts, files, write_model
from safetensors.torch import load_file

from base.files import PROJECT, read_lines
from models.zoo import build_network
from tinydm.stages import calibrate, quantize, sample

SMALL = NETWORK | {"image_size": 8, "ch_mult": [1], "attn_resolutions": []}
# steps enough for a penalty of rounding, shares of unequal size
LEARNING = ["effort.weight_iters=10", "effort.input_iters=5", "effort.batch_size=5", "threads=1"]
# Learning goes on from sums in another order. Few codes may then flip, of those that lie between
# two; scales are learned in steps of about 1e-3 of themselves.
FLIPPED, MOVED = 0.002, 0.05


# three commands at the price of one start; the words of `tinydm calibrate`, a run to draw from
COMMANDS = """
import sys
from base.workers import joined
from tinydm.stages import calibrate, quantize, sample

*words, out, drawn = sys.argv[1:]
with joined(True):
    calibrate.run([*words, f"out={out}"])
    quantize.run([out])
    sample.run([drawn, "precision=simulated"])
"""


def torchrun(*words):
    """Two workers of a thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *map(str, words)], env=environment, **pipes)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The YAML of a model of few units with random weights beside it."""
    torch.manual_seed(0)
    content = {"network": SMALL, "schedule": {}, "sampling": {"skip": "uniform"}}
    state = build_network(**SMALL).state_dict()
    return write_model(tmp_path_factory.mktemp("model"), "small", content, state)


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    """Calibrated, quantized and sampled by this process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    calibrate.run([*files(model), *WORDS, *LEARNING, f"out={out}"])
    shutil.copytree(out, out.with_name("calibrated"))
    quantize.run([str(out)])
    sample.run([str(out), "precision=simulated"])
    return out


def calibrated_copy(alone, folder):
    """A run folder that is ready to be quantized."""
    out = shutil.copytree(alone.with_name("calibrated"), folder / "copy")
    text = (out / "config.yaml").read_text()
    (out / "config.yaml").write_text(text.replace(f"out: {alone}", f"out: {out}"))
    return out


def assert_same_within_rounding(out, alone):
    found, expected = (load_file(run / "quantized.safetensors") for run in (out, alone))
    assert found.keys() == expected.keys()
    flipped = count = 0
    for name, values in expected.items():
        if values.is_floating_point():
            largest = values.abs().max()
            torch.testing.assert_close(found[name], values, rtol=0, atol=float(MOVED * largest))
        else:
            flipped, count = flipped + int((found[name] != values).sum()), count + values.numel()
    assert flipped <= FLIPPED * count


def test_two_workers_make_what_one_makes(alone, model, tmp_path):
    out, drawn, script = tmp_path / "run", calibrated_copy(alone, tmp_path), tmp_path / "three.py"
    script.write_text(COMMANDS)
    shutil.copy(alone / "quantized.safetensors", drawn)
    words = [*files(model), *WORDS, *LEARNING]
    process = torchrun(script, *words, out, drawn)
    printed, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for once in ("calibrate: 24 samples", f"quantize: {out}", "sample: 6 images in"):
        assert printed.count(once) == 1  # the first worker alone speaks
    (folder,) = tmp_path.glob("trajectory-*")
    assert sorted(path.stem for path in folder.iterdir()) == ["000000", "000004"]
    calibration = "calibration.safetensors"
    assert (out / calibration).read_bytes() == (alone / calibration).read_bytes()
    assert_same_within_rounding(out, alone)
    assert read_lines(out / "stages.jsonl")[-1]["workers"] == 2
    assert artefacts(drawn) == artefacts(alone) and (drawn / "samples.npz").exists()


def test_a_killed_worker_ends_the_command_and_one_alone_goes_on(alone, tmp_path):
    out = calibrated_copy(alone, tmp_path)
    folder, process = (
        out / "resume/quantize/1_reconstruct",
        torchrun("-m", "tinydm", "quantize", out),
    )
    deadline = time.monotonic() + 200
    while not list(folder.glob("00[3-9]_*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    children = f"/proc/{process.pid}/task/{process.pid}/children"
    os.kill(int(open(children).read().split()[-1]), signal.SIGKILL)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    ours = [line for line in printed.splitlines() if "run the same command to continue" in line]
    assert len(ours) == 1 and "Traceback" not in printed.partition(ours[0])[0]
    done = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    quantize.run([str(out)])
    assert len(done) >= 4 and not folder.exists()
    assert_same_within_rounding(out, alone)

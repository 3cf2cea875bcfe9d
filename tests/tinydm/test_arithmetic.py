"""effort.dtype: auto is decided by the processor and a trial, told, and kept."""

import re

import pytest
from pipeline import WORDS, files

from tinydm import arithmetic
from tinydm.run_folder import open_run
from tinydm.stages import calibrate, quantize

FEW = [*WORDS, "effort.dtype=auto", "effort.weight_iters=1", "effort.input_iters=1"]


@pytest.fixture
def machine(monkeypatch):
    """Says how long steps take; None for bf16: the processor emulates it."""

    def is_one(fp32, bf16):
        def measure(trial, objective, schedule):
            assert bf16 is not None and schedule.batch_size == 16 and trial.name
            return {"fp32": fp32, "bf16": bf16}

        monkeypatch.setattr(arithmetic, "computes_bfloat16", lambda device: bf16 is not None)
        monkeypatch.setattr(arithmetic, "seconds_by_dtype", measure)

    return is_one


@pytest.mark.parametrize(
    "fp32, bf16, chosen, told",
    [
        (0.03, 0.02, "bf16", "bf16; a step of .* took 30.0 ms in fp32 and 20.0 ms in bf16"),
        (0.03, 0.029, "fp32", "fp32; a step of .* took 30.0 ms in fp32 and 29.0 ms in bf16"),
        (0.03, None, "fp32", "fp32, as this processor does not compute bfloat16 itself"),
    ],
)
def test_a_run_learns_in_what_is_faster_and_keeps_to_it(
    pixel_model, tmp_path, machine, capsys, fp32, bf16, chosen, told
):
    machine(fp32, bf16)
    words = [*files(pixel_model), *FEW, f"out={tmp_path / 'run'}"]
    calibrate.run(words)
    assert open_run(tmp_path / "run").config.effort.dtype == "auto"
    lines = []
    quantize.quantize(open_run(tmp_path / "run"), lines.append)
    (line,) = [line for line in lines if line.startswith("effort.dtype: ")]
    assert re.fullmatch(f"effort.dtype: {told}", line)
    machine(0.001, None if bf16 else 0.0001)  # elsewhere all is different
    again = [calibrate.create([*files(pixel_model)], [*FEW, f"out={tmp_path / 'run'}"])]
    for run in [*again, open_run(tmp_path / "run")]:
        assert run.config.effort.dtype == chosen
        assert run.config.passes[1]["reconstruct"]["dtype"] == chosen
    trial = run.config.provenance.get("trial", {})
    assert (trial.get("fp32"), trial.get("bf16")) == ((fp32, bf16) if bf16 else (None, None))
    run.config.force = True
    lines.clear()
    quantize.quantize(run, lines.append)
    assert not any(line.startswith("effort.dtype") for line in lines)
    assert run.config.provenance.get("trial", {}) == trial
    recipe = quantize.read_recipe(tmp_path / "run/quantized.safetensors")[0]
    assert recipe["effort"]["dtype"] == recipe["passes"][1]["reconstruct"]["dtype"] == chosen


def test_what_learns_nothing_decides_nothing(pixel_model, tmp_path, machine):
    machine(0.03, 0.02)
    calibrate.run([*files(pixel_model, method="minmax"), *FEW, f"out={tmp_path / 'run'}"])
    lines = []
    quantize.quantize(open_run(tmp_path / "run"), lines.append)
    assert not any("dtype" in line for line in lines)
    asked = ["effort.dtype=fp32"]  # nor does a word that is said later make it another recipe
    assert open_run(tmp_path / "run", asked).config.effort.dtype == "fp32"

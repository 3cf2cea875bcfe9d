"""Every script that a user types works under dash, bash and by its own run bit, from any folder."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
SAMPLE = (["bits.weight"], 2, "is not key=value")
DOWNLOAD = (["--list"], 0, "ommer-lab.com")
SCRIPTS = {
    "sample_cifar.sh": SAMPLE,
    "sample_bedroom.sh": SAMPLE,
    "sample_imagenet.sh": SAMPLE,
    "scripts/for_church.sh": SAMPLE,
    "scripts/for_coco.sh": SAMPLE,
    "scripts/for_imagenet64.sh": SAMPLE,
    "scripts/check_gpu.sh": SAMPLE,
    "scripts/download_models.sh": DOWNLOAD,
    "scripts/download_first_stages.sh": DOWNLOAD,
    "scripts/test.sh": (["--version"], 0, "pytest"),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("shell", [["dash"], ["bash"], []], ids=["dash", "bash", "itself"])
def test_entry_scripts_run_under_any_shell_from_any_folder(script, shell, tmp_path):
    if shell and not shutil.which(*shell):
        pytest.skip(f"{shell[0]} is not installed")
    words, status, said = SCRIPTS[script]
    result = subprocess.run(
        [*shell, PROJECT / script, *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OUT": str(tmp_path / "run")},
    )
    assert (result.returncode, said in result.stdout + result.stderr) == (status, True), (
        result.stderr
    )


def test_the_gate_begins_like_the_others():
    gate, script = ((PROJECT / name) for name in (".ci/run", "scripts/test.sh"))
    assert gate.read_text().splitlines()[1] == script.read_text().splitlines()[1] and os.access(
        gate, os.X_OK
    )

"""scripts/check_gpu.sh with tools that are played: what it writes, and when it fails."""

import os
import subprocess

import pytest

from base.files import PROJECT

SMI = "#!/bin/sh\necho 'NVIDIA Toy, 24000 MiB, 580.1'\n"
PYTHON = """#!/bin/sh
case "$1" in
  -) cat >/dev/null; {card} ;;
  -m) {tests} ;;
  *) for word in "$@"; do case "$word" in
       networks=*) {speed} ;;
       out=*) cd "${{word#out=}}"; echo row >> benchmark.jsonl; echo '| ratios |' > benchmark.md ;;
     esac; done ;;
esac
"""
GOOD = {"card": "echo 'PyTorch 2.99, CUDA 13.9'", "tests": "echo '7 passed in 2.00s'", "speed": ":"}


def check(folder, **parts):
    """-> exit status, what was printed, the block or "" if there is none."""
    tools = {"nvidia-smi": SMI, "python": PYTHON.format(**GOOD | parts)}
    for name, text in tools.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    done = subprocess.run(
        ["bash", PROJECT / "scripts/check_gpu.sh", "rounds=3"],
        capture_output=True,
        text=True,
        env=os.environ
        | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "python"),
            "OUT": str(folder / "out"),
        },
    )
    block = folder / "out/block.md"
    return done.returncode, done.stdout + done.stderr, block.read_text() if block.exists() else ""


def test_the_block_has_card_versions_tests_and_ratios(tmp_path):
    status, _, block = check(tmp_path)
    assert status == 0
    head, text, summary, table = (part for part in block.split("\n\n"))
    assert head.startswith("### On a GPU, 20") and table == "| ratios |\n"
    assert text == (
        "NVIDIA Toy, 24000 MiB, 580.1; PyTorch 2.99, CUDA 13.9. Made by `bash scripts/check_gpu.sh "
        "rounds=3`. Tests that need a GPU passed:"
    )
    assert summary == "    7 passed in 2.00s"


@pytest.mark.parametrize(
    "parts, status, said",
    [
        ({"card": "exit 1"}, 2, "sees no GPU"),
        (
            {"tests": "echo 'FAILED test_x'; echo '1 failed, 6 passed'; exit 1"},
            1,
            "    FAILED test_x",
        ),
        ({"tests": "exit 1"}, 1, "no result after 270 s"),
        ({"speed": "exit 1"}, 1, "Nothing was measured."),
    ],
)
def test_what_goes_wrong_is_told_and_fails(parts, status, said, tmp_path):
    found, printed, block = check(tmp_path, **parts)
    assert found == status and said in printed
    assert bool(block) == (status == 1)

"""Jobs of submitit: processes of this machine, and of a Slurm whose commands are played. What jobs
do is pickled by value here, so that none has to import PyTorch."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinydm import launch

submitit = pytest.importorskip("submitit")

# Slurm's commands. sbatch begins every task of an array at once, in the background, and sacct
# tells those that have ended.
PLAYED = {
    "sbatch": """#!/bin/bash
grep -q partition=none "$1" && { echo "sbatch: error: invalid partition" >&2; exit 1; }
id=$(( $(ls "$PLAYED" | wc -l) + 100 )); cp "$1" "$PLAYED/$id.sh"
export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_PROCID=0
last=$(grep -oP -- '--array=0-\\K[0-9]+' "$1" || echo 0)
for i in $(seq 0 "$last"); do (
  name=$id
  if grep -q -- --array "$1"; then
    export SLURM_ARRAY_JOB_ID=$id SLURM_ARRAY_TASK_ID=$i; name=${id}_$i
  fi
  bash "$PLAYED/$id.sh" > /dev/null 2>&1; echo "$name|FAILED|n1" >> "$PLAYED/../ended"
) > /dev/null 2>&1 & done
echo "Submitted batch job $id"
""",
    "srun": """#!/bin/bash
name=$SLURM_JOB_ID
[ -n "$SLURM_ARRAY_JOB_ID" ] && name=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
while [[ $1 == -* ]]; do
  case $1 in --output) out=$2; shift;; --error) err=$2; shift;; esac
  shift
done
files=("$out" "$err"); files=("${files[@]//%A_%a/$name}"); files=("${files[@]//%j/$name}")
files=("${files[@]//%t/0}")
exec "$@" >> "${files[0]}" 2>> "${files[1]}"
""",
    "sacct": '#!/bin/bash\necho "JobID|State|NodeList"; cat "$PLAYED/../ended" 2> /dev/null\n',
    "scancel": '#!/bin/bash\necho "$@" >> "$PLAYED/../cancelled"\n',
}


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A played Slurm; the folder of the scripts that were submitted."""
    scripts, commands = tmp_path / "slurm/scripts", tmp_path / "slurm/bin"
    scripts.mkdir(parents=True)
    commands.mkdir()
    for name, text in PLAYED.items():
        (commands / name).write_text(text)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PLAYED", str(scripts))
    monkeypatch.setitem(launch.POLL, "slurm", 0.1)
    monkeypatch.setattr(submitit.SlurmJob, "_results_timeout_s", 0)
    yield scripts
    submitit.SlurmJob.watcher.clear()


def launched(work, tasks, out, launcher="local", jobs=2, **slurm):
    """{task: (what it returned, failure)}."""
    found = {}
    launch.run_jobs(
        work,
        tasks,
        lambda task, *outcome: found.update({task: outcome}),
        launcher=launcher,
        jobs=jobs,
        slurm=slurm,
        out=out,
    )
    return found


def comes_true(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_at_most_so_many_local_jobs_go_at_a_time(tmp_path):
    def work(task, gpu):
        started = time.time()
        time.sleep(0.5)
        return started, time.time(), gpu

    found = launched(work, range(3), tmp_path / "new")
    assert {failure for _, failure in found.values()} == {""}
    spans = [returned[:2] for returned, _ in found.values()]
    going = [sum(a <= start < b for a, b in spans) for start, _ in spans]
    assert max(going) == 2
    # nothing is left of jobs that ended well
    assert [*(tmp_path / "new").iterdir()] == []


def test_local_jobs_have_a_gpu_each(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-8fe")
    found = launched(lambda task, gpu: gpu, range(3), tmp_path, jobs=3)
    assert [found[task][0] for task in range(3)] == ["3", "GPU-8fe", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launch._gpus() == ["0", "1"]


def test_the_last_words_of_a_local_job(tmp_path, monkeypatch):
    """Of one that raises, and of one that is killed; the third is none the worse."""
    monkeypatch.setattr(submitit.LocalJob, "_results_timeout_s", 0)

    def work(task, gpu):
        if task == "raises":
            raise OSError("the lamp is out")
        if task == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return task

    found = launched(work, ["raises", "killed", "ends"], tmp_path)
    assert found["ends"] == ("ends", "")
    returned, said = found["raises"]
    assert returned is None and "ended without a result: OSError: the lamp is out (" in said
    log = Path(said.rpartition("(")[2].rstrip(")"))
    assert "Traceback" in log.read_text() and log.parent.parent.samefile(tmp_path)
    assert "ended without a result: no words" in found["killed"][1]


def test_an_interrupted_comparison_ends_its_local_jobs(tmp_path):
    """As by Ctrl-C, which reaches what a job has started too; nothing is left."""
    program = f"""
import pathlib, signal, subprocess, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
sys.path.insert(0, {str(Path(launch.__file__).parents[1])!r})
from tinydm import launch
def work(task, gpu):
    subprocess.run(["bash", "-c", 'echo $$ > "$0"; exec sleep 60', str(task)])
task = pathlib.Path(sys.argv[1], "child")
launch.run_jobs(work, [task], print, launcher="local", jobs=1, slurm={{}}, out=task.parent)
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    parent = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    child = tmp_path / "child"
    assert comes_true(lambda: child.exists() and child.read_text().strip())
    os.killpg(parent.pid, signal.SIGINT)
    assert parent.wait(60) != 0

    def is_empty():
        try:
            os.killpg(parent.pid, 0)
        except ProcessLookupError:
            return True

    assert comes_true(is_empty)


def test_slurm_is_given_an_array_and_its_settings(slurm, tmp_path):
    settings = {"partition": "gpu", "gpus_per_node": 1, "timeout_min": 600, "cpus_per_task": 4}
    found = launched(lambda task, gpu: (task, gpu), [7, 8, 9], tmp_path / "a", "slurm", **settings)
    assert found == {task: ((task, None), "") for task in (7, 8, 9)}
    (script,) = slurm.iterdir()
    lines = script.read_text().splitlines()
    for word in ("array=0-2%2", "partition=gpu", "gpus-per-node=1", "time=600", "cpus-per-task=4"):
        assert f"#SBATCH --{word}" in lines
    (command,) = [line for line in lines if line.startswith("srun ")]
    assert " --cpus-per-task=4 env PYTHONPATH=" in command
    # one alone is no array; a day unless it is said
    assert launched(lambda task, gpu: task, [1], tmp_path / "b", "slurm") == {1: (1, "")}
    text = (slurm / "101.sh").read_text()
    assert "--array" not in text and "#SBATCH --time=1440\n" in text


def test_a_job_that_slurm_ended_is_told(slurm, tmp_path):
    def work(task, gpu):
        if task == 1:
            print("slurmstepd: error: CANCELLED DUE TO TIME LIMIT", file=sys.stderr, flush=True)
            os._exit(1)
        return task

    found = launched(work, [1, 2], tmp_path / "out", "slurm")
    assert found[2] == (2, "")
    words = "job 100_0 ended without a result: slurmstepd: error: CANCELLED DUE TO TIME LIMIT ("
    assert found[1][0] is None and found[1][1].startswith(words)


def test_an_interrupted_comparison_cancels_its_slurm_jobs(slurm, tmp_path, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(launch.time, "sleep", stop)
    with pytest.raises(KeyboardInterrupt):
        launched(lambda task, gpu: task, [1, 2], tmp_path / "out", "slurm")
    assert (tmp_path / "slurm/cancelled").read_text() == "100_0\n100_1\n"


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"gpuz": 1}, "launcher=slurm: Unknown argument 'gpuz' for executor 'slurm'"),
        ({"partition": "none"}, "Slurm does not take the jobs: sbatch: error: invalid partition"),
    ],
)
def test_settings_that_slurm_refuses_are_one_sentence(slurm, tmp_path, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as caught:
        launched(lambda task, gpu: task, [1], tmp_path / "out", "slurm", **settings)
    assert "\n" not in str(caught.value)


def test_without_slurm_or_submitit_a_sentence_says_so(monkeypatch):
    launch.check("", 1, {})
    launch.check("local", 2, {})
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match='launcher=slurm: Could not detect "srun"'):
        launch.check("slurm", 2, {})
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match="launcher=local needs .* pip install 'submitit>=1.5.2'"):
        launch.check("local", 2, {})

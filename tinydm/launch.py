"""Calls as jobs of their own, by the library submitit, which is optional: processes of this machine
or jobs of a cluster that Slurm runs.

A job is a pickled call in a Python of its own, which finds modules where this process does. What
submitit needs of it, and what it prints, lies in OUT/jobs-*, which is removed once all of them
ended well."""

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from base.errors import unknown_word

LAUNCHERS = ("local", "slurm")
INSTALL = "pip install 'submitit>=1.5.2'"
POLL = {"local": 0.1, "slurm": 5.0}  # seconds
# minutes that a job may take: submitit asks for a limit
YEAR, DAY = 365 * 24 * 60, 24 * 60
# what a job returned, or None and its last words
Ended = Callable[[Any, Any, str], None]


def check(launcher: str, jobs: int, slurm: dict[str, Any]) -> None:
    """Raises ValueError for what `run_jobs` could not do, before any work begins."""
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    if launcher:
        _executor(launcher, jobs, slurm, tempfile.gettempdir())


def run_jobs(
    work: Callable[[Any, str | None], Any],
    tasks: Sequence[Any],
    ended: Ended,
    *,
    launcher: str,
    jobs: int,
    slurm: dict[str, Any],
    out: Path,
) -> None:
    """Calls work(task, gpu) for every task in a job of its own, at most `jobs` at a time, and
    ended(task, returned, failure) here as they end: what it returned and "", or None and the last
    words of a job that raised, was killed or ran out of time. `gpu` is None, or the GPU of a local
    job, which shares it with others only where there are more jobs than GPUs. Stopped by an
    exception, it ends the jobs. Raises ValueError for settings that submitit or Slurm refuse."""
    out.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="jobs-", dir=out))
    executor = _executor(launcher, jobs, slurm, folder)
    # Slurm holds back itself what is too much, submitit's local jobs all begin at once
    slots, gpus = (len(tasks), []) if launcher == "slurm" else (jobs, _gpus())
    waiting, going, failed = list(tasks), {}, False
    try:
        while waiting or going:
            free = [slot for slot in range(slots) if slot not in going]
            new = {slot: waiting.pop(0) for slot in free[: len(waiting)]}
            given = [(task, gpus[slot % len(gpus)] if gpus else None) for slot, task in new.items()]
            going |= dict(zip(new, zip(new.values(), _submitted(executor, work, given))))
            time.sleep(POLL[launcher])
            for slot in [slot for slot, (_, job) in going.items() if job.done()]:
                task, job = going.pop(slot)
                returned, failure = _outcome(job)
                failed = failed or bool(failure)
                ended(task, returned, failure)
    finally:
        for _, job in going.values():
            job.cancel(check=False)
    if not failed:
        shutil.rmtree(folder, ignore_errors=True)


def _executor(launcher, jobs, slurm, folder):
    """submitit's executor of these settings. Raises ValueError for those that it does not take."""
    if launcher not in LAUNCHERS:
        raise ValueError(unknown_word(f"launcher '{launcher}' is unknown", launcher, LAUNCHERS))
    try:
        import submitit
    except ImportError:
        raise ValueError(
            f"launcher={launcher} needs the library submitit, which is not installed; get it with: "
            f"{INSTALL}"
        ) from None
    settings = {"name": "tinydm", "timeout_min": YEAR}
    if launcher == "slurm":
        settings |= {"timeout_min": DAY, "array_parallelism": jobs, **slurm}
        if "cpus_per_task" in settings:
            # srun of Slurm 22.05 and later does not take it over from sbatch
            settings.setdefault("srun_args", [f"--cpus-per-task={settings['cpus_per_task']}"])
    path = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    python = shlex.join(["env", f"PYTHONPATH={path}", sys.executable])
    try:
        how = {"cluster": launcher, f"{launcher}_python": python}
        executor = submitit.AutoExecutor(folder, **how)
        executor.update_parameters(**{f"{launcher}_{key}": settings[key] for key in settings})
    except (RuntimeError, NameError, ValueError, TypeError) as error:
        sentence = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(f"launcher={launcher}: {sentence}") from None
    return executor


def _gpus():
    """The GPUs of this machine by the names that CUDA_VISIBLE_DEVICES has for them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else list(map(str, range(count)))


def _submitted(executor, work, given):
    """A job for each of the arguments `given`, together: an array of Slurm's."""
    from submitit.core.utils import FailedJobError
    from submitit.helpers import clean_env

    if not given:
        return []
    try:
        # a comparison that is a job of Slurm's itself hands down nothing of that
        with clean_env(), executor.batch():
            jobs = [executor.submit(work, *arguments) for arguments in given]
    except FailedJobError as error:
        raise ValueError(f"Slurm does not take the jobs: {_last_line(str(error))}") from None
    return jobs


def _outcome(job):
    """(what it returned, "") or (None, its last words)."""
    from submitit.core.utils import UncompletedJobError

    try:
        return job.result(), ""
    except UncompletedJobError:
        words = _last_line(job.stderr() or "") or f"no words, {job.state.lower()}"
        place = os.path.relpath(job.paths.stderr)
        return None, f"job {job.job_id} ended without a result: {words} ({place})"


def _last_line(text):
    return ([line.strip() for line in text.splitlines() if line.strip()] or [""])[-1]

"""Compare quantization methods under one protocol:

    python scripts/compare.py configs/compare/FILE.yaml [FILE.yaml ...] [--jobs N] [key=value ...]

Every model x bits x method x variant x seed of a YAML is a run folder
OUT/MODEL/METHOD-BITS[-VARIANT]-SEED. Those of a model and sampler share its full-precision images
and trajectories, which are made first. Writes OUT/table.md, OUT/table.csv, OUT/figure.png (PSNR and
FD of every row), OUT/report.html and OUT/results.jsonl (all of it but images and weights, a line a
run). Started again it continues; finished runs are skipped, and so are those that a results file
holds (known=results/equal.jsonl). A stage that fails ends its own run and is told in the table, as
is a checkpoint that is not there. `--jobs N` (or jobs=N) makes N runs at a time, each a job of its
own: of this machine, or with launcher=slurm of a cluster (docs/scaling.md); key=value are keys of
the YAML. scripts/docs.py adds finished runs to the results that ship."""

import argparse
import errno
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import torch
from filelock import lock_descriptor

from base.config import load, split_arguments
from base.files import PROJECT, read_lines, write_lines, write_text
from tinydm import launch
from tinydm.identity import IMAGES
from tinydm.plan import Cell, CompareConfig, absent, cells_of, is_finished, shared_by
from tinydm.report.chart import draw
from tinydm.report.page import write_report
from tinydm.report.results import read_run, results_text
from tinydm.report.table import Row, assemble, csv_text, empty_row, markdown, row_of, tables

# stages that also write beside the run folder, and those that write inside alone
SHARED = [("calibrate",), ("sample", "precision=float")]
INSIDE = [("quantize",), ("sample",), ("evaluate",)]
REPORT = "table.md", "table.csv", "figure.png", "report.html", "results.jsonl"
NO_LOCKS = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK


def run(arguments: list[str]) -> None:
    usage = "python scripts/compare.py FILE.yaml [...] [--jobs N] [key=value ...]"
    parser = argparse.ArgumentParser(usage=usage)
    parser.add_argument("words", nargs="+")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_intermixed_args(arguments)
    files, overrides = split_arguments(options.words)
    jobs = [] if options.jobs is None else [f"jobs={options.jobs}"]
    plans = [load(CompareConfig, [file], [*overrides, *jobs]) for file in files]
    for plan in plans:
        launch.check(plan.launches_by, plan.jobs, plan.slurm)
    if len({plan.out for plan in plans}) < len(plans):
        raise ValueError(f"two of {', '.join(files)} have the same out folder; give each its own")
    for file, plan, cells in zip(files, plans, [cells_of(plan) for plan in plans]):
        words = shlex.join([file, *overrides])
        rows = compare(plan, cells, words=words, log=partial(print, flush=True))
        written = ", ".join(f"{plan.out}/{name}" for name in REPORT)
        print(f"{markdown(rows)}compare: {written}")


def compare(
    plan: CompareConfig,
    cells: Sequence[Cell],
    *,
    words: str = "FILE.yaml",
    log: Callable[[str], None] = print,
) -> list[Row]:
    """Makes the runs that are missing as the plan says, then writes tables and report; returns the
    rows. A row without its checkpoint names the command that fills it: compare.py with `words`."""
    for cell in cells:
        cell.note = "" if cell.known else absent(cell.config, words)
    todo = [cell for cell in cells if not cell.note and not is_finished(cell)]
    numbers = f"{len(todo)} to make, {sum(bool(cell.note) for cell in cells)} without checkpoint"
    log(f"compare: {len(cells)} runs in {plan.out}: {numbers}")
    first = {shared_by(cell): cell for cell in reversed(cells)}
    shared = [_shared_run(first[key]) for key in dict.fromkeys(map(shared_by, todo))]
    # those of a model work on the same files
    models = [[*runs] for _, runs in groupby(shared, key=lambda run: run.folder.parent)]
    _make_all(plan, models, [], log)
    for run in shared:
        if not run.note:
            with locked(run.folder):
                # what the others need of it lies beside it, and what that took
                _keep_stages(run.folder)
                # on NFS a remainder stays until the lock is let go
                shutil.rmtree(run.folder, ignore_errors=True)
    _make_all(plan, [[cell] for cell in todo], INSIDE, log)
    return _report(plan, cells)


def _shared_run(cell):
    """A run that only fills what others share, so that none of them is charged for it."""
    folder = cell.folder.with_name(f"shared-{cell.folder.name}")
    return replace(cell, folder=folder, arguments=[*cell.arguments, f"out={folder}"])


def _keep_stages(folder):
    """Keeps what its stages took beside a shared run, FOLDER.stages.jsonl: of the first time, which
    made what later ones find."""
    kept = folder.with_name(f"{folder.name}.stages.jsonl")
    if not kept.exists():
        write_lines(kept, read_lines(folder / "stages.jsonl"))


def _make_all(plan, groups, inside, log):
    """Makes lists of runs, those of a list in turn, here or each list in a job of its own."""
    threads = torch.get_num_threads()
    if not (plan.launches_by and groups):
        for cell in chain(*groups):
            make(cell, threads, log, inside)
        return

    def ended(cells, said, failure):
        for cell, (note, line) in zip(cells, said or [(failure, "")] * len(cells)):
            cell.note = note
            log(line or f"compare: {cell.folder}: {note}")

    if plan.launches_by == "local":
        threads = max(1, threads // min(plan.jobs, len(groups)))
    else:
        threads = plan.slurm.get("cpus_per_task")  # or what Slurm gives
    launch.run_jobs(
        partial(make_in_job, threads, inside),
        groups,
        ended,
        launcher=plan.launches_by,
        jobs=plan.jobs,
        slurm=plan.slurm,
        out=Path(plan.out),
    )


def make_in_job(
    threads: int | None, inside: Sequence[tuple[str, ...]], cells: list[Cell], gpu: str | None
) -> list[tuple[str, str]]:
    """What a job does: makes runs in turn. Returns the note and the line of log of each."""
    said = []
    for cell in cells:
        make(cell, threads, said.append, inside, gpu)
    return [(cell.note, line) for cell, line in zip(cells, said)]


def make(
    cell: Cell,
    threads: int | None,
    log: Callable[[str], None],
    inside: Sequence[tuple[str, ...]] = INSIDE,
    gpu: str | None = None,
) -> None:
    """All stages of a run, in processes of their own; one that fails leaves its last words in
    `cell.note`. They use so many threads, or what they find, and that GPU, or any."""
    started = time.monotonic()
    environment = {"OMP_NUM_THREADS": threads, "CUDA_VISIBLE_DEVICES": gpu}
    environment = {name: str(value) for name, value in environment.items() if value is not None}
    with locked(cell.folder) as lock:
        with locked(cell.folder.parent) as shared_lock:
            cell.note = _run_stages(cell, SHARED, environment, (lock, shared_lock))
        cell.note = cell.note or _run_stages(cell, inside, environment, (lock,))
    done = f"done in {time.monotonic() - started:.0f} s"
    log(f"compare: {cell.folder}: {cell.note or done}")


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lets one at a time into a folder, made if need be; gives the descriptor of the lock file. A
    process that inherits it holds the lock too: stages that outlive a comparison are waited for.
    Where the file system has no locks, as Lustre may, nobody is kept out."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            try:
                lock_descriptor(file.fileno())
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
            # none is left of a file whose folder was removed while this waited
            if os.fstat(file.fileno()).st_nlink:
                yield file.fileno()
                return


def _run_stages(cell, stages, environment, locks):
    """The scripts in turn, their output in log.txt; "" or what went wrong."""
    log_path = cell.folder / "log.txt"
    how = {"stderr": subprocess.STDOUT, "env": os.environ | environment, "pass_fds": locks}
    for script, *words in stages:
        inputs = cell.arguments if script == "calibrate" else [cell.folder]
        command = [sys.executable, PROJECT / "scripts" / f"{script}.py", *inputs, *words]
        with open(log_path, "ab") as log:
            status = subprocess.run(command, stdout=log, **how).returncode
        if status:
            last = (log_path.read_text(errors="replace").splitlines() or ["nothing"])[-1].strip()
            return f"{script} of seed {cell.config.seed} ended with status {status}: {last}"
    return ""


def _report(plan, cells):
    """Writes the files of REPORT, the page with the first run of every row; returns the rows."""
    results = [cell.known or (None if cell.note else read_run(cell.folder)) for cell in cells]
    rows = [
        row_of(result) if result else empty_row(cell.config, note=cell.note)
        for cell, result in zip(cells, results)
    ]
    images = [shared_by(cell, (IMAGES,)) for cell in cells]
    protocol = {key: row.protocol for key, row in zip(images, rows) if row.runs}
    for key, row in zip(images, rows):
        row.protocol = row.protocol or protocol.get(key, "")
    rows, out = assemble(rows), Path(plan.out)
    write_text(out / "table.md", markdown(rows))
    write_text(out / "table.csv", csv_text(rows))
    write_text(out / "results.jsonl", results_text(filter(None, results)))
    draw(rows, out / "figure.png")
    shown = [row.runs[0].folder for row in rows if row.runs and row.runs[0].folder]
    write_report(shown, out / "report.html", comparison=tables(rows))
    return rows

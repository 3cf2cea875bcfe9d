"""Compare quantization methods under one protocol:

    python scripts/compare.py configs/compare/FILE.yaml [FILE.yaml ...] [--jobs N] [key=value ...]

Every model x bits x method x variant x seed of a YAML is a run folder
OUT/MODEL/METHOD-BITS[-VARIANT]-SEED. Those of a model and sampler share its full-precision images
and trajectories, which are made first. Writes OUT/table.md, OUT/table.csv, OUT/figure.png (PSNR and
FD of every row) and OUT/report.html. Started again it continues; finished runs are skipped. A stage
that fails ends its own run and is told in the table, as is a checkpoint that is not there. `--jobs
N` makes N runs at a time; key=value are keys of the YAML."""

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from base.config import load, read_yaml, split_arguments
from base.files import PROJECT, write_text
from models.diffusion import find_checkpoint
from tinydm.recipe import RunConfig, check, differences, load_recipe, without_free
from tinydm.report.page import write_report
from tinydm.report.plots import score_chart
from tinydm.report.table import assemble, columns_of, csv_text, empty_row, markdown, row_of, tables

# stages that also write beside the run folder
SHARED = [("calibrate",), ("sample", "precision=float")]
OWN = [("quantize",), ("sample",), ("evaluate",)]


@dataclass
class CompareConfig:
    """What is compared. Names are those of configs/model, bits, method and preset; a path ends in
    .yaml. Every variant makes rows of its own of each model, bits and method, with what it says
    merged over these."""

    models: list[str] = field(default_factory=list)
    bits: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    # {name: [key=value or a name of configs/method, ...]}
    variants: Any = None
    # of the calibration data and of all else but the images
    seeds: list[int] = field(default_factory=lambda: [1000])
    preset: str = "demo"
    overrides: list[str] = field(default_factory=list)  # key=value of every run
    out: str = "runs/compare"


@dataclass
class Cell:
    """One run: its folder, what calibrate.py is told, the resolved recipe, and what kept it from
    its numbers."""

    folder: Path
    arguments: list
    config: RunConfig
    note: str = ""


def run(arguments):
    parser = argparse.ArgumentParser(
        usage="python scripts/compare.py FILE.yaml [...] [--jobs N] [key=value ...]"
    )
    parser.add_argument("words", nargs="+")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_intermixed_args(arguments)
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}; it must be at least 1")
    files, overrides = split_arguments(options.words)
    plans = [load(CompareConfig, [file], overrides) for file in files]
    if len({plan.out for plan in plans}) < len(plans):
        raise ValueError(f"two of {', '.join(files)} have the same out folder; give each its own")
    for file, plan, cells in zip(files, plans, [cells_of(plan) for plan in plans]):
        compare(shlex.join([file, *overrides]), plan, cells, options.jobs)


def cells_of(plan):
    """Every run of a plan, checked. Raises ValueError before any work begins."""
    for key in ("models", "bits", "methods", "seeds"):
        if not getattr(plan, key):
            raise ValueError(f"nothing to compare: {key} is empty; list at least one")
    check_variants(plan.variants)
    variants = plan.variants or {"": []}
    cells = [
        cell_of(plan, model, bits, method, seed, str(name), words)
        for model in plan.models
        for bits in plan.bits
        for method in plan.methods
        for name, words in variants.items()
        for seed in plan.seeds
    ]
    called = {}
    for method in plan.methods:
        name = read_yaml(yaml_path("method", method)).get("method")
        if called.setdefault(name, method) != method:
            raise ValueError(
                f"{called[name]} and {method} are both called '{name}', which the rows go by; "
                "give each a "
                "method: of its own"
            )
    by_recipe = {}
    for cell in cells:
        other = by_recipe.setdefault(
            json.dumps(without_free(asdict(cell.config)), sort_keys=True), cell
        )
        if other is not cell:
            raise ValueError(
                f"{other.folder.name} and {cell.folder.name} are the same recipe; leave one out"
            )
    return cells


def check_variants(variants):
    """Raises ValueError for what is no list of words, or has a name that a folder cannot have."""
    if not isinstance(variants or {}, dict):
        raise ValueError(
            f"variants must be a mapping such as {{quad: [calibration.builder=quad]}}; found "
            f"{variants}"
        )
    for name, words in (variants or {}).items():
        if not re.fullmatch(r"[\w.-]+", str(name)):
            raise ValueError(
                f"variant '{name}' cannot be part of a folder's name; use letters, digits, '.', "
                "'_', '-'"
            )
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(
                f"variant '{name}' must be a list of key=value or names of configs/method; found "
                f"{words}"
            )


def cell_of(plan, model, bits, method, seed, variant, words):
    names, changes = split_arguments(words)
    # a variant's method stands in the row's place
    own = [("method", name) for name in names or [method]]
    files = [
        yaml_path(*pair)
        for pair in (("model", model), ("bits", bits), *own, ("preset", plan.preset))
    ]
    parts = Path(method).stem, Path(bits).stem, variant, str(seed)
    folder = Path(plan.out) / Path(model).stem / "-".join(filter(None, parts))
    words = [
        *plan.overrides,
        *changes,
        f"calibration.seed={seed}",
        f"seed={seed}",
        f"out={folder}",
        *([f"variant={variant}"] if variant else []),
    ]
    config = load_recipe(files, words)
    check(config)
    return Cell(folder, [*files, *words], config)


def yaml_path(kind, name):
    return name if name.endswith(".yaml") else str(PROJECT / "configs" / kind / f"{name}.yaml")


def compare(asked, plan, cells, jobs):
    """Make what is missing, then write the tables and the report; `asked` is the YAML and what was
    said on top."""
    for cell in cells:
        cell.note = absent(cell.config, asked)
    todo = [cell for cell in cells if not cell.note and not finished(cell)]
    print(
        f"compare: {len(cells)} runs in {plan.out}: {len(todo)} to make, "
        f"{sum(bool(cell.note) for cell in cells)} without checkpoint",
        flush=True,
    )
    threads = torch.get_num_threads()
    first = {shared_by(cell): cell for cell in reversed(cells)}
    for key in dict.fromkeys(map(shared_by, todo)):
        shared = shared_run(first[key])
        make(shared, threads, own=[])
        if not shared.note:
            with locked(shared.folder):
                # what the others need of it lies beside it
                shutil.rmtree(shared.folder)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda cell: make(cell, max(1, threads // jobs)), todo))
    report(plan, cells)


def absent(config, asked):
    """ "" or what a model needs before it can be run."""
    try:
        find_checkpoint(asdict(config))
        return ""
    except ValueError:
        how = (
            f"fill this row with: {config.download} &&"
            if config.download
            else "put it there and run:"
        )
        return f"needs {config.checkpoint}; {how} python scripts/compare.py {asked}"


def finished(cell):
    """Whether the run folder holds the scores of this very recipe."""
    path = cell.folder / "metrics.json"
    if not path.exists() or differences(
        load(RunConfig, [cell.folder / "config.yaml"]), cell.config
    ):
        return False
    asked = json.loads(path.read_text())["protocol"]["asked"]
    return all(asked[key] == asdict(cell.config)[key] for key in ("sampling", "evaluation"))


def images_of(cell):
    """What decides the full-precision images of a run."""
    c = cell.config
    return cell.folder.parent, str(
        (c.sampling, c.guidance, c.weights, c.checkpoint, c.schedule, c.scale_factor)
    )


def shared_by(cell):
    c = cell.config.calibration
    return *images_of(cell), cell.config.seed, c.images, c.start, c.start_step, c.data


def shared_run(cell):
    """A run that only fills what the runs of `shared_by` share, so that none of them is charged for
    it."""
    folder = cell.folder.with_name(f"shared-{cell.folder.name}")
    return replace(cell, folder=folder, arguments=[*cell.arguments, f"out={folder}"])


def make(cell, threads, own=OWN):
    """All stages of a run; one that fails leaves its last words in `cell.note`."""
    started = time.monotonic()
    with locked(cell.folder) as lock:
        with locked(cell.folder.parent) as shared_lock:
            cell.note = run_stages(cell, SHARED, threads, (lock, shared_lock))
        cell.note = cell.note or run_stages(cell, own, threads, (lock,))
    print(
        f"compare: {cell.folder}: {cell.note or f'done in {time.monotonic() - started:.0f} s'}",
        flush=True,
    )


@contextmanager
def locked(folder):
    """One process at a time. Stages inherit the lock's file: one that outlives a killed comparison
    still holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # the folder was removed while this waited
            if not (folder / ".lock").exists():
                continue
            yield file.fileno()
            return


def run_stages(cell, stages, threads, locks):
    """The scripts in turn, their output in log.txt; "" or what went wrong."""
    log_path = cell.folder / "log.txt"
    for script, *words in stages:
        inputs = cell.arguments if script == "calibrate" else [cell.folder]
        with open(log_path, "ab") as log:
            status = subprocess.run(
                [sys.executable, PROJECT / "scripts" / f"{script}.py", *inputs, *words],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)},
                pass_fds=locks,
            ).returncode
        if status:
            said = log_path.read_text(errors="replace").splitlines() or ["nothing"]
            return f"{script} of seed {cell.config.seed} ended with status {status}: {said[-1].strip()}"
    return ""


def report(plan, cells):
    """The tables as Markdown and CSV, the figure, and the page with the first run of every row."""
    rows = [
        empty_row(cell.config, note=cell.note) if cell.note else row_of(cell.folder)
        for cell in cells
    ]
    protocol = {images_of(cell): row.protocol for cell, row in zip(cells, rows) if row.runs}
    for cell, row in zip(cells, rows):
        row.protocol = row.protocol or protocol.get(images_of(cell), "")
    rows, out = assemble(rows), Path(plan.out)
    write_text(out / "table.md", markdown(rows))
    write_text(out / "table.csv", csv_text(rows))
    draw(rows, out / "figure.png")
    write_report(
        [row.runs[0] for row in rows if row.runs], out / "report.html", comparison=tables(rows)
    )
    print(
        f"{markdown(rows)}compare: {out}/table.md, {out}/table.csv, {out}/figure.png, "
        f"{out}/report.html"
    )


def draw(rows, path):
    """PSNR and FD of every row with numbers, beside the FD of the full-precision model under the
    same protocol. Labels say what tells the rows apart."""
    done = [row for row in rows if row.runs]
    if not done:
        return
    full = {row.protocol: row for row in rows if row.numbers and not row.runs}
    facts = [(row.model, "W{}A{}".format(*row.bits.split("/")), row.method) for row in done]
    varied = [i for i, values in enumerate(zip(*facts)) if len(set(values)) > 1] or [2]
    panels = {}
    for column in columns_of(done):
        if column.startswith(("PSNR", "FID", "FD")):
            title = (
                "PSNR to full precision, dB"
                if column == "PSNR dB"
                else f"{column} (lower is better)"
            )
            panels[title] = [(row.values(column), full[row.protocol].mean(column)) for row in done]
    score_chart(path, [", ".join(row[i] for i in varied) for row in facts], panels)

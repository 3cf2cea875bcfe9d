"""Measure what calibration costs, and what comes out: time to quality.

    tinydm benchmark calibration                                all of it: many hours
    tinydm benchmark calibration "models=[latent-compact]" "seeds=[1000]"     a part of it
    tinydm benchmark calibration make=false                     tables of the runs that are finished
    tinydm benchmark calibration PLAN.yaml [key=value ...]      of another comparison

Every method of configs/compare/calibration.yaml in its published form and in the fast one, by
calibration seed, as `tinydm compare` makes them: run folders OUT/MODEL/METHOD-BITS-FORM-SEED.
Finished ones are not made again, also those that compare made, nor those that a results file holds
(known=results/calibration.jsonl); a failed one is told in the tables. Leave the machine alone
meanwhile: CPU seconds grow where others share its caches.

What counts is CPU seconds of the stages calibrate and quantize (loading the model included, Python
and images not), of one thread, and the largest of their peaks. The full-precision trajectories are
made once for all runs that share them, and each run is charged with all of them, as if it were
alone. Quality is SQNR of the predicted noise, mean over the steps, and PSNR to the images of full
precision. A form `reaches` the published one where the means of both are at least as high.

RUN/cost.json holds this, with where the seconds went and the machine: that of the process which
first writes it, so name an instruction set that runs were held to here as well
(ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 tinydm benchmark calibration). OUT/calibration.md
holds the tables. `python scripts/docs.py results OUT calibration` adds finished runs to
results/calibration.jsonl and writes docs/calibration.md."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from base.config import load, split_arguments
from base.files import PROJECT, write_text
from tinydm.benchmark.cost import note_cost
from tinydm.benchmark.machine import machine
from tinydm.compare import compare
from tinydm.plan import Cell, CompareConfig, cells_of, is_finished
from tinydm.report.costs import LEGEND, PLAN, tables
from tinydm.report.results import Result, read_run

log = logging.getLogger("tinydm").info


@dataclass
class CalibrationConfig(CompareConfig):
    """A comparison, and whether to make the runs that are missing."""

    make: bool = True  # false: tables of the finished ones alone


def run(words: list[str]) -> None:
    files, overrides = split_arguments(words)
    plan = load(CalibrationConfig, files or [PROJECT / PLAN], overrides)
    cells = cells_of(plan)
    if plan.make:
        compare(plan, cells, log=log)
    results, notes = measured(cells)
    page = "\n".join([*tables(plan, results), *notes, "", *LEGEND.splitlines(), ""])
    write_text(Path(plan.out) / "calibration.md", page)
    print(page)
    log(f"benchmark: the tables are in {plan.out}/calibration.md")


def measured(cells: Sequence[Cell]) -> tuple[list[Result], list[str]]:
    """The finished runs, each with its cost, which is noted in its folder; and a line for each that
    has none, with the reason."""
    results, notes = [], []
    for cell in cells:
        if cell.note:
            notes.append(f"- {cell.name}: {cell.note}")
        elif cell.known:
            results.append(cell.known)
        elif is_finished(cell):
            try:
                # on the processor alone: CPU seconds say nothing of a GPU's work
                note_cost(cell.folder, machine(torch.device("cpu"), threads_of(cell)))
                results.append(read_run(cell.folder))
            except ValueError as error:
                notes.append(f"- {cell.name}: {error}")
    return results, notes


def threads_of(cell: Cell) -> int:
    """How many threads a finished run computed with, as its recipe noted."""
    return read_run(cell.folder).config.provenance["threads"]

"""What it took to calibrate a run, and where the seconds went: RUN/cost.json.

CPU seconds are those of the stages calibrate and quantize, which count from the loading of the
model on. The full-precision trajectories that samples are picked from are made once for several
runs; every run is charged with all of them, as if it were alone. Peak memory is the largest of the
three."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from base.files import read_lines, write_text
from tinydm.identity import IMAGES, TRAJECTORIES, select
from tinydm.report.results import config_of, read_recipe

STAGES = "calibrate", "quantize"
SHARED, KEPT = "shared-", ".stages.jsonl"
RECONSTRUCT = "reconstruct"


def note_cost(folder: Path, machine: dict[str, Any]) -> None:
    """Writes cost.json into a finished run folder, with the machine that it is said to have run on;
    one that was written for these very stages stays. Raises ValueError where the stages or the
    trajectories were not timed."""
    path = folder / "cost.json"
    cost = {"machine": machine, **cost_of(folder)}
    before = json.loads(path.read_text()) if path.exists() else {}
    if {**cost, "machine": None} != {**before, "machine": None}:
        write_text(path, json.dumps(cost))


def cost_of(folder: Path) -> dict[str, Any]:
    """CPU seconds, the most bytes of memory, and CPU seconds by what they were spent on, `where`,
    in order. Raises ValueError as `note_cost` does."""
    timed = {row["stage"]: row for row in read_lines(folder / "stages.jsonl")}
    calibrate, quantize = (timed.get(name, {}) for name in STAGES)
    shared = trajectories_stage(folder)
    rows = [shared, calibrate, quantize]
    if not all("cpu_seconds" in row for row in rows[1:]):
        raise ValueError(
            f"{folder}/stages.jsonl has no CPU seconds, an earlier version made it; make the run "
            "again in another out= folder"
        )
    if not shared:
        raise ValueError(
            f"no {SHARED}*{KEPT} beside {folder} says what its trajectories took; remove the "
            "trajectory-* folders there and make the run again in another out= folder"
        )
    where = {"trajectories": shared["cpu_seconds"], "picking": calibrate["cpu_seconds"]}
    where |= parts_of(read_lines(folder / "passes.jsonl"), quantize)
    return {
        "cpu_seconds": round(sum(row["cpu_seconds"] for row in rows), 2),
        "peak_rss_bytes": max(row["peak_rss_bytes"] for row in rows),
        "where": {name: round(seconds, 2) for name, seconds in where.items()},
    }


def trajectories_stage(folder: Path) -> dict[str, Any]:
    """What recording the trajectories of a run took, as a row of stages.jsonl: of the runs that
    tinydm/compare.py made for others to share, shared-NAME.stages.jsonl, the dearest with the same
    trajectories as NAME. {} where none is kept."""
    wanted, found = _trajectories(folder), [{}]
    for path in folder.parent.glob(f"{SHARED}*{KEPT}"):
        name = path.name.removeprefix(SHARED).removesuffix(KEPT)
        other = folder.with_name(name)
        if (other / "config.yaml").exists() and _trajectories(other) == wanted:
            found += [row for row in read_lines(path) if row["stage"] == "calibrate"]
    # later ones found them there
    return max(found, key=lambda row: row.get("cpu_seconds", -1))


def _trajectories(folder):
    """What decides them."""
    return select(asdict(config_of(read_recipe(folder))), (IMAGES, TRAJECTORIES))


def parts_of(facts: Iterable[dict[str, Any]], stage: dict[str, Any]) -> dict[str, float]:
    """CPU seconds of the parts of `quantize` by its passes.jsonl. Passes are timed by the clock,
    and taken as CPU seconds at the rate of the whole stage. Reconstruction says how long its units
    learned, measuring errors included, and the rest of it is capture. What no pass took, `rest`, is
    loading, converting and packing."""
    facts, rate = list(facts), stage["cpu_seconds"] / max(stage["seconds"], 1e-9)
    found: dict[str, float] = {}
    for row in facts:
        if row.keys() == {"pass", "seconds"}:
            found[row["pass"]] = found.get(row["pass"], 0) + row["seconds"] * rate
    whole = found.pop(RECONSTRUCT, 0)
    if whole:
        own = [row for row in facts if row["pass"] == RECONSTRUCT and "unit" in row]
        learned = min(sum(row["seconds"] for row in own) * rate, whole)
        found |= {f"{RECONSTRUCT}: learning": learned, f"{RECONSTRUCT}: capture": whole - learned}
    return found | {"rest": max(0.0, stage["cpu_seconds"] - sum(found.values()))}

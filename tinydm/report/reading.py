"""What a report says of run folders, whose files may be absent: numbers, texts, table cells."""

import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from base.config import flatten, read_yaml

CALIBRATE = (
    "python scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml "
    "configs/method/METHOD.yaml out={run}"
)
COMMANDS = {
    "config.yaml": CALIBRATE,
    "map.json": "python scripts/quantize.py {run}",
    "passes.jsonl": "python scripts/quantize.py {run}",
    "stages.jsonl": CALIBRATE,
    "samples": "python scripts/sample.py {run}",
    "float samples": "python scripts/sample.py {run} precision=float",
    "metrics.json": "python scripts/evaluate.py {run}",
}


def number(value: Any, digits: int = 3) -> str:
    """A number with `digits` decimals, or significant ones below 1; a dash for None; a text."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) >= 1 or value == 0 else f"{value:.{digits}g}"


def read_run(folder: Path | str) -> dict[str, Any]:
    """All that the page says of a run. Raises ValueError for no folder and for broken JSON."""
    folder = Path(folder)
    if not folder.is_dir():
        remedy = "give a folder made by scripts/calibrate.py"
        raise ValueError(f"run folder {folder} does not exist; {remedy}")
    commands = {name: command.format(run=folder) for name, command in COMMANDS.items()}
    run = {"path": folder, "name": folder.resolve().name, "commands": commands}
    path = folder / "config.yaml"
    run["config"] = OmegaConf.to_container(read_yaml(path), resolve=True) if path.is_file() else {}
    for name in ("map.json", "metrics.json", "passes.jsonl", "stages.jsonl"):
        run[name.split(".")[0]] = _read_json(folder / name, commands[name])
    for row in run["passes"] or []:
        row.setdefault("phase", row.get("stage"))  # its name in earlier versions
    metrics = run["metrics"] or {}
    of = {kind: metrics.get(kind) or {} for kind in ("quantized", "float", "protocol")}
    run["scores"] = {kind: of[kind].get("scores") or {} for kind in ("quantized", "float")}
    run["scored"] = of["protocol"].get("scores") or {}
    run["curve"] = _sqnr_curve(metrics.get("sqnr_db_per_step") or [])
    run["sizes"] = metrics.get("sizes") or {}
    run["samples"] = sorted(path.name for path in (folder / "samples").glob("*.png"))
    # without metrics.json nobody knows where the images of full precision are
    full = run["float_path"] = folder / (metrics.get("float_samples") or "unknown")
    run["common"] = [name for name in run["samples"] if (full / name).is_file()]
    run["seconds"] = _seconds(run["stages"] or [], run["passes"] or [])
    if run["map"]:
        run["layers"], run["groups"] = _layers(run["map"]["layers"])
    settings = {key: run["config"].get(key) or {} for key in ("sampling", "provenance")}
    protocol = flatten({"protocol": of["protocol"], **settings})
    run["protocol"] = [[key, str(value)] for key, value in protocol.items()]
    return run


def _read_json(path: Path, command: str) -> Any:
    """Content of a .json file, or the list of lines of a .jsonl file; None where there is none."""
    if not path.is_file():
        return None
    text = path.read_text()
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line]
        return json.loads(text)
    except json.JSONDecodeError as error:
        remedy = f"delete it and make it again: {command}"
        raise ValueError(f"{path} is not valid JSON ({error}); {remedy}") from None


def _sqnr_curve(rows: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(step, SQNR in dB) of the steps that have a finite one."""
    points = [(row["step"], row["sqnr_db"]) for row in rows]
    return [(step, db) for step, db in points if db is not None and math.isfinite(db)]


def _seconds(stages: list[dict], passes: list[dict]) -> list[list[str]]:
    """Rows of a table: seconds of every stage and every pass, and of its phases and the passes
    inside it apart. A stage that was interrupted and continued counts with all its parts."""
    spent = defaultdict(float)
    for row in stages:
        spent[row["stage"]] += row["seconds"]
    for row in passes:
        if "seconds" in row:
            place = "in segments" if "segment" in row else None
            name = " ".join(filter(None, (row["pass"], row["phase"], place)))
            spent[f"of which pass {name}"] += row["seconds"]
    return [[name, number(seconds, 1)] for name, seconds in spent.items()]


def _layers(layers: list[dict[str, Any]]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of two tables: every layer, and together those of the same role, kind and widths."""
    rows, groups = [], defaultdict(lambda: [0, 0, 0])
    for layer in layers:
        widths = [_width(layer["weight_bits"]), _width(layer["input_bits"])]
        kind = [layer["role"], layer["kind"], *widths]
        rows.append([layer["name"], *kind, layer["params"], layer["macs"]])
        for i, amount in enumerate((1, layer["params"], layer["macs"])):
            groups[tuple(kind)][i] += amount
    return rows, [[*kind, *amounts] for kind, amounts in groups.items()]


def _width(bits: int | list[int] | None) -> str:
    """Bits as text; an attention product has two inputs and no weight."""
    return "/".join(map(str, bits)) if isinstance(bits, list) else number(bits)


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A table with a row for each run -> {scores, rows, notes}, where `scores` are the heads of the
    columns between those of the recipe and those of pairs, sizes and times. Scores share a column
    only if they share count, reference and extractor, which the notes tell."""
    columns = {}  # in the order of their first runs
    for run in runs:
        names = [name for scores in run["scores"].values() for name in scores]
        names = [name for name in names if not name.endswith("-std")]
        columns |= {(name, _protocol_of(run)): None for name in names}
    protocols = dict.fromkeys(protocol for _, protocol in columns)
    marks = {protocol: f"scores {chr(97 + i)}" for i, protocol in enumerate(protocols)}
    notes = [{"mark": mark, "count": key[0], "reference": key[1]} for key, mark in marks.items()]
    return {
        "scores": [{"value": name, "small": marks[protocol]} for name, protocol in columns],
        "rows": [_summary_row(run, list(columns)) for run in runs],
        "notes": notes,
    }


def _protocol_of(run: dict[str, Any]) -> tuple:
    return tuple(run["scored"].get(key) for key in ("count", "reference", "extractor_sha256"))


def _summary_row(run: dict[str, Any], columns: list[tuple[str, tuple]]) -> list[Any]:
    config, paired, sizes = run["config"], (run["metrics"] or {}).get("paired") or {}, run["sizes"]
    bits, sampling = (config.get(key) or {} for key in ("bits", "sampling"))
    row = [run["name"], config.get("name", "–"), config.get("method", "–")]
    row += [f"{bits.get('weight', '–')}/{bits.get('input', '–')}"]
    row += [sampling.get("steps"), sampling.get("num")]
    for name, protocol in columns:
        scores = run["scores"] if protocol == _protocol_of(run) else {"quantized": {}, "float": {}}
        row.append(_beside_float(*(scores[kind].get(name) for kind in ("quantized", "float"))))
    sqnr = [db for _, db in run["curve"]]
    stages = [s for s in run["stages"] or [] if s["stage"] in ("calibrate", "quantize")]
    spent = [line["seconds"] for line in stages]
    return row + [
        paired.get("psnr_db"),
        paired.get("ssim"),
        sum(sqnr) / len(sqnr) if sqnr else None,
        _beside_float(sizes.get("quantized_bytes"), sizes.get("float_bytes")),
        f"{sizes['float_bytes'] / sizes['quantized_bytes']:.2f}×" if sizes else None,
        number(sum(spent), 1) if spent else None,
    ]


def _beside_float(quantized: float | None, full_precision: float | None) -> dict[str, Any]:
    return {"value": quantized, "small": f"float {number(full_precision)}"}

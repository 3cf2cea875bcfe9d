"""One static HTML file about one or several run folders: tables, plots and image grids, all inside
the file.

Every file of a run may be absent; its section then names the command that makes it. The page loads
nothing and runs nothing, all text from the runs is escaped, and the same run folders give the same
bytes."""

import html
import io
import json
import math
from collections import defaultdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from omegaconf import OmegaConf
from PIL import Image

from base.config import flatten, read_yaml
from base.files import write_atomically
from models.data import read_image
from tinydm.report.markup import Html, data_uri, document, drawing, element, number, table

CALIBRATE = (
    "python scripts/calibrate.py configs/model/MODEL.yaml configs/bits/BITS.yaml "
    "configs/method/METHOD.yaml "
    "out={run}"
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
FLOAT_COLOUR, QUANTIZED_COLOUR = "#9aa5b1", "#b4441c"
LINE_COLOURS = ("#b4441c", "#1f5f8b", "#3c7a3a", "#7a4b94", "#8a6d1b", "#4d5763")


# -------------------------------------------------------------------------------------------------------
# reading a run
def read_json(path):
    """Content of a .json file, or the list of lines of a .jsonl file; None where the file is
    absent."""
    if not path.is_file():
        return None
    text = path.read_text()
    try:
        return (
            [json.loads(line) for line in text.splitlines() if line]
            if path.suffix == ".jsonl"
            else json.loads(text)
        )
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not valid JSON ({error}); delete it and make it again: "
            f"{COMMANDS[path.name].format(run=path.parent)}"
        ) from None


def read_run(folder):
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"run folder {folder} does not exist; give a folder made by scripts/calibrate.py"
        )
    path = folder / "config.yaml"
    config = OmegaConf.to_container(read_yaml(path), resolve=True) if path.is_file() else {}
    run = {"path": folder, "name": folder.resolve().name, "config": config}
    for name in ("map.json", "metrics.json", "passes.jsonl", "stages.jsonl"):
        run[name.split(".")[0]] = read_json(folder / name)
    metrics = run["metrics"] or {}
    float_samples = metrics.get("float_samples")
    run["samples"] = sample_names(folder / "samples")
    run["float_path"] = folder / float_samples if float_samples else None
    run["float_samples"] = sample_names(run["float_path"]) if float_samples else []
    return run


def missing(run, name, what=""):
    command = element("code", COMMANDS[name].format(run=run["path"]))
    return element("p", f"{what or name} not there yet; this makes it: ", command, class_="missing")


def sample_names(folder):
    return sorted(path.name for path in folder.glob("*.png"))


def curve(run):
    """(step, SQNR in dB) of the steps that have a finite one."""
    rows = (run["metrics"] or {}).get("sqnr_db_per_step") or []
    return [
        (row["step"], row["sqnr_db"])
        for row in rows
        if row["sqnr_db"] is not None and math.isfinite(row["sqnr_db"])
    ]


def seconds_per_stage(run):
    """Stage -> seconds; a stage that was interrupted and continued counts with all its parts."""
    seconds = defaultdict(float)
    for row in run["stages"] or []:
        seconds[row["stage"]] += row["seconds"]
    return dict(seconds)


# ----------------------------------------------------------------------------------------------------
# the runs compared
def summary(runs):
    """A row per run. Scores share a column only if they share count, reference and extractor."""
    columns = {}
    for run in runs:
        metrics = run["metrics"] or {}
        for kind in ("quantized", "float"):
            for name in (metrics.get(kind) or {}).get("scores") or {}:
                if not name.endswith("-std"):
                    columns.setdefault((name, *protocol_key(metrics)), None)
    marks = {
        key: f"scores {chr(97 + i)}"
        for i, key in enumerate(dict.fromkeys(key for _, key in map(keyed, columns)))
    }
    head = ["run", "model", "method", "bits W/A", "steps", "images"] + [
        Html(html.escape(name) + element("small", marks[key])) for name, key in map(keyed, columns)
    ]
    head += [
        "PSNR, dB",
        "SSIM",
        "mean SQNR, dB",
        "bytes, quantized",
        "ratio",
        "calibrate + quantize, s",
    ]
    notes = [
        element(
            "p",
            f"{mark}: {number(count)} images against {reference or 'no reference'}",
            class_="note",
        )
        for (count, reference, _), mark in marks.items()
    ]
    return Html("".join([table(head, [summary_row(run, columns) for run in runs]), *notes]))


def keyed(column):
    return column[0], column[1:]


def protocol_key(metrics):
    protocol = (metrics.get("protocol") or {}).get("scores") or {}
    return protocol.get("count"), protocol.get("reference"), protocol.get("extractor_sha256")


def summary_row(run, columns):
    config, metrics = run["config"], run["metrics"] or {}
    bits, sampling = (config.get(key) or {} for key in ("bits", "sampling"))
    row = [
        run["name"],
        config.get("name", "–"),
        config.get("method", "–"),
        f"{bits.get('weight', '–')}/{bits.get('input', '–')}",
        sampling.get("steps"),
        sampling.get("num"),
    ]
    for name, *key in columns:
        same = tuple(key) == protocol_key(metrics)
        quantized, full = (
            ((metrics.get(kind) or {}).get("scores") or {}).get(name) if same else None
            for kind in ("quantized", "float")
        )
        row.append(Html(number(quantized) + element("small", f"float {number(full)}")))
    paired, points, sizes = metrics.get("paired") or {}, curve(run), metrics.get("sizes") or {}
    ratio = f"{sizes['float_bytes'] / sizes['quantized_bytes']:.2f}×" if sizes else "–"
    small = element("small", f"float {number(sizes.get('float_bytes'))}")
    seconds = seconds_per_stage(run)
    calibration = [seconds[stage] for stage in ("calibrate", "quantize") if stage in seconds]
    return row + [
        paired.get("psnr_db"),
        paired.get("ssim"),
        sum(value for _, value in points) / len(points) if points else None,
        Html(number(sizes.get("quantized_bytes")) + small),
        Html(ratio),
        Html(number(sum(calibration), 1) if calibration else "–"),
    ]


def comparison_table(caption, head, lines):
    lines = [
        [cell if any(map(str.isalpha, cell)) else Html(html.escape(cell)) for cell in line]
        for line in lines
    ]
    return element(
        "div",
        element("h2", "Comparison"),
        element("p", f"Protocol: {caption}.", class_="note"),
        table(head, lines),
    )


def sqnr_plot(runs):
    lines = [(run["name"], curve(run)) for run in runs]
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(line for line in lines if line[1]):
        axes.plot(*zip(*points), marker=".", color=LINE_COLOURS[i % len(LINE_COLOURS)], label=name)
    axes.set(xlabel="sampling step (0 = pure noise)", ylabel="SQNR of the predicted noise, dB")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return drawing(figure, "signal to quantization noise ratio at each sampling step")


# ------------------------------------------------------------------------------------------------------
# one run's parts
def samples_section(run):
    if not run["samples"]:
        return missing(run, "samples")
    common = [name for name in run["samples"] if name in set(run["float_samples"])]
    names = common or run["samples"]
    grids = [grid(run["path"] / "samples", names, "quantized")]
    if common:
        grids.insert(0, grid(run["float_path"], names, "full precision, same seeds"))
    return element(
        "div",
        element("div", *grids, class_="grids"),
        *([] if common else [missing(run, "float samples")]),
    )


def grid(folder, names, caption):
    """The first images as one PNG: 8 x 8 at twice their size if they are small, else 4 x 4 of at
    most 128 pixels."""
    first = read_image(folder / names[0])
    columns = 8 if first.shape[2] <= 64 else 4
    side, names = min(first.shape[2], 128), names[: columns**2]
    sheet = Image.new(
        "RGB", (columns * (side + 1) - 1, -(-len(names) // columns) * (side + 1) - 1), "white"
    )
    for i, name in enumerate(names):
        image = Image.fromarray(read_image(folder / name).permute(1, 2, 0).numpy())
        image = image if image.width == side else image.resize((side, side), Image.LANCZOS)
        sheet.paste(image, (i % columns * (side + 1), i // columns * (side + 1)))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", optimize=True)
    zoom = 2 if side <= 32 else 1
    picture = element(
        "img",
        src=data_uri(buffer.getvalue(), "png"),
        alt=f"{len(names)} images, {caption}",
        width=sheet.width * zoom,
        height=sheet.height * zoom,
        class_="pixels",
    )
    seeds = f"{names[0].removesuffix('.png')} to {names[-1].removesuffix('.png')}"
    return element("figure", picture, element("figcaption", f"{caption}; {seeds}"))


def errors_section(run):
    if run["passes"] is None:
        return missing(run, "passes.jsonl")
    rows = [
        row
        for row in run["passes"]
        if (row.get("error_before") or 0) > 0 and (row.get("error_after") or 0) > 0
    ]
    if not rows:
        return element("p", "No pass of this run reported an error per block.", class_="note")
    stages = list(dict.fromkeys(row.get("stage") or row["pass"] for row in rows))
    groups = [
        [row for row in rows if (row.get("stage") or row["pass"]) == stage] for stage in stages
    ]
    figure = Figure(figsize=(10, 0.8 + 0.26 * max(map(len, groups))), layout="constrained")
    for axes, stage, group in zip(
        figure.subplots(1, len(groups), squeeze=False)[0], stages, groups
    ):
        places = range(len(group))
        for offset, key, colour in (
            (-0.2, "error_before", FLOAT_COLOUR),
            (0.2, "error_after", QUANTIZED_COLOUR),
        ):
            axes.barh(
                [place + offset for place in places],
                [row[key] for row in group],
                0.4,
                color=colour,
                label=key.removeprefix("error_"),
            )
        axes.set_yticks(
            places,
            [row.get("unit") or ", ".join(row.get("layers", [])) for row in group],
            fontsize=8,
        )
        errors = [math.log10(row[key]) for row in group for key in ("error_before", "error_after")]
        decades = 10.0 ** math.floor(min(errors) - 0.1), 10.0 ** math.ceil(max(errors))
        axes.set(
            xscale="log",
            xlabel="error of the block's output",
            xlim=decades,
            ylim=(len(group) - 0.4, -0.6),
        )
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(stage, fontsize=10)
        axes.grid(alpha=0.3, axis="x")
    axes.legend(frameon=False, fontsize=8)
    return drawing(figure, "error of every block before and after reconstruction")


def sizes_section(run):
    sizes = (run["metrics"] or {}).get("sizes")
    if not sizes:
        return missing(run, "metrics.json", "sizes (metrics.json)")
    full, quantized = sizes["float_bytes"], sizes["quantized_bytes"]
    return table(
        ["weights", "bytes", "share"],
        [["full precision", full, 1.0], ["quantized", quantized, quantized / full]],
    )


def time_section(run):
    if run["stages"] is None:
        return missing(run, "stages.jsonl")
    seconds = seconds_per_stage(run)
    per_pass = defaultdict(float)
    for row in run["passes"] or []:
        if "seconds" in row:
            per_pass[f"{row['pass']} {row.get('stage', '')}".strip()] += row["seconds"]
    rows = [[stage, number(value, 1)] for stage, value in seconds.items()]
    rows += [[f"of which pass {name}", number(value, 1)] for name, value in per_pass.items()]
    return table(["stage", "seconds"], [[name, Html(value)] for name, value in rows])


def map_section(run):
    if run["map"] is None:
        return missing(run, "map.json")
    layers = [
        {
            **layer,
            "weight_bits": width(layer["weight_bits"]),
            "input_bits": width(layer["input_bits"]),
        }
        for layer in run["map"]["layers"]
    ]
    groups = defaultdict(lambda: [0, 0, 0])
    for layer in layers:
        key = tuple(layer[name] for name in ("role", "kind", "weight_bits", "input_bits"))
        for i, amount in enumerate((1, layer["params"], layer["macs"])):
            groups[key][i] += amount
    shares = (
        f"{len(layers)} layers; quantized: {run['map']['params_share']:.1%} of the parameters and "
        f"{run['map']['macs_share']:.1%} of the multiply-adds."
    )
    names = ["name", "role", "kind", "weight_bits", "input_bits", "params", "macs"]
    every = table(
        ["layer", "role", "kind", "weight bits", "input bits", "parameters", "multiply-adds"],
        [[layer[name] for name in names] for layer in layers],
    )
    return element(
        "div",
        element("p", shares),
        table(
            ["role", "kind", "weight bits", "input bits", "layers", "parameters", "multiply-adds"],
            [[*key, *amounts] for key, amounts in groups.items()],
        ),
        element("details", element("summary", "every layer"), every),
    )


def width(bits):
    """Bits as text; an attention product has two inputs and no weight."""
    return "/".join(map(str, bits)) if isinstance(bits, list) else number(bits)


def protocol_section(run):
    rows = flatten(
        {
            "protocol": (run["metrics"] or {}).get("protocol") or {},
            **{key: run["config"].get(key) or {} for key in ("sampling", "provenance")},
        }
    )
    parts = (
        [table(["setting", "value"], [[key, str(value)] for key, value in rows.items()])]
        if rows
        else []
    )
    parts += [missing(run, "config.yaml")] if not run["config"] else []
    parts += [missing(run, "metrics.json")] if run["metrics"] is None else []
    return element("div", *parts)


# -------------------------------------------------------------------------------------------------------------
# the page
@matplotlib.rc_context({"text.parse_math": False, "svg.hashsalt": "tinydm"})
def write_report(runs, path, comparison=()):
    """Write the page about the run folders `runs` to `path`, whole or not at all. `comparison`,
    tables of texts as (caption, head, lines), comes first."""
    if not runs and not comparison:
        raise ValueError("no run folder was given; name at least one")
    path, runs = Path(path), [read_run(folder) for folder in runs]
    compared = [
        element("h1", "TinyDM report"),
        *(comparison_table(*part) for part in comparison),
        element("h2", "What was run"),
        summary(runs),
        element("h2", "Error at each sampling step"),
        sqnr_plot(runs) if any(curve(run) for run in runs) else "",
    ]
    compared += [
        missing(run, "metrics.json", f"SQNR per step of {run['name']}")
        for run in runs
        if not curve(run)
    ]
    page = document("TinyDM report", *compared, *(run_page(run) for run in runs))
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def run_page(run):
    parts = [element("h2", run["name"])]
    for title, section in SECTIONS.items():
        parts += [element("h3", title), section(run)]
    return element("section", *parts)


SECTIONS = {
    "Full precision and quantized": samples_section,
    "Error of each block": errors_section,
    "Sizes": sizes_section,
    "Time": time_section,
    "What is quantized": map_section,
    "Protocol": protocol_section,
}

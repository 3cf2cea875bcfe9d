"""A Markdown table of evaluated run folders:  python scripts/table.py RUN [RUN ...] [out=FILE.md]

All runs must share one protocol (model, image count, sampler, reference, extractor); a run that does not is refused.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quant.files import write_text  # noqa: E402
from scripts.cli import main  # noqa: E402
from scripts.run_folder import open_run, split_arguments  # noqa: E402


def run(arguments):
    folders, words = split_arguments(arguments)
    if not folders or any(not w.startswith("out=") for w in words):
        raise ValueError(f"expected run folders and out=FILE, found {' '.join(arguments)}")
    text = table([open_run(folder) for folder in folders])
    print(text)
    if words:
        write_text(words[0].removeprefix("out="), text + "\n")


def table(runs):
    """Markdown: the protocol in words, the full-precision row, a row per run."""
    all_metrics = [json.loads(run.need("metrics.json", "evaluate").read_text()) for run in runs]
    first = all_metrics[0]
    for run, metrics in zip(runs, all_metrics):
        if protocol(metrics) != protocol(first):
            raise ValueError(f"{run.folder} was evaluated under another protocol than {runs[0].folder} "
                             f"({protocol(metrics)} instead of {protocol(first)}); evaluate both alike")
    names = [n for n in first["quantized"]["scores"] if not n.endswith("-std")]
    head = ["W/A", "method", "bytes", *names, "PSNR dB", "SSIM", "SQNR dB", "calibration s"]
    rows = [["32/32", "full precision", f"{first['sizes']['float_bytes']:,}",
             *(f"{first['float']['scores'][n]:.2f}" for n in names), "", "", "", ""]]
    for run, m in zip(runs, all_metrics):
        sqnr = [step["sqnr_db"] for step in m["sqnr_db_per_step"]]
        rows.append([f"{run.config.bits.weight}/{run.config.bits.input}", run.config.method,
                     f"{m['sizes']['quantized_bytes']:,}", *(f"{m['quantized']['scores'][n]:.2f}" for n in names),
                     f"{m['paired']['psnr_db']:.2f}", f"{m['paired']['ssim']:.3f}", f"{sum(sqnr) / len(sqnr):.1f}",
                     f"{calibration_seconds(run):.0f}"])
    lines = [f"Protocol: {protocol(first)}.", "", "| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def protocol(metrics):
    """What two rows must share, as one line."""
    asked, scores = metrics["protocol"]["asked"], metrics["protocol"]["scores"]
    s = asked["sampling"]
    made = asked["provenance"]
    return (f"{asked['model']}, {scores['count']} images of seed {s['seed']}, {s['sampler']} {s['steps']} {s['skip']} "
            f"steps, eta {s['eta']}, guidance {asked['guidance']['scale']}, {asked['weights']} weights, "
            f"reference {scores.get('reference')}, extractor {scores.get('extractor')}, {scores.get('tool')}, "
            f"torch {made['versions']['torch']} on {made['device']}")


def calibration_seconds(run):
    """Time of collecting data and quantizing."""
    rows = [json.loads(line) for line in run.path("stages.jsonl").read_text().splitlines()]
    return sum(row["seconds"] for row in rows if row["stage"] in ("calibrate", "quantize"))


if __name__ == "__main__":
    main(run)

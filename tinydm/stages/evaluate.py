"""Score the images of a run folder:

    python scripts/evaluate.py RUN [evaluation.reference=FOLDER] [force=true]

Writes RUN/metrics.json: distribution scores of quantized and full-precision images, the distance
between both, PSNR, SSIM and LPIPS between images of the same seed, SQNR of eps at every step, sizes
in bytes, bit operations, each with its protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from base.config import one_folder
from base.files import write_text
from evaluation.scores.cost import bit_operations
from evaluation.scores.distribution import MIN_IMAGES, distribution_scores
from evaluation.scores.frechet import distance_to_float
from evaluation.scores.paired import paired_scores
from models.sampling import trajectory
from quant.analysis import step_sqnr
from tinydm.identity import scoring_protocol
from tinydm.run_folder import Run, open_run
from tinydm.stages.sample import model_of, sample_folder


def run(arguments: list[str]) -> None:
    """Runs the stage by a command line."""
    print(evaluate(open_run(*one_folder(arguments))))


def evaluate(run: Run) -> str:
    """Scores the images of a run folder; returns the scores as text."""
    config, path = run.config, run.path("metrics.json")
    protocol = scoring_protocol(config, str(run.model.device))
    if path.exists() and not config.force:
        if json.loads(path.read_text())["protocol"]["asked"] == protocol:
            return f"evaluate: done already, {path}"
    folders = {precision: sample_folder(run, precision) for precision in ("float", "quantized")}
    for precision, folder in folders.items():
        missing = [i for i in range(config.sampling.num) if not (folder / f"{i:06d}.png").exists()]
        if missing:
            word = " precision=float" if precision == "float" else ""
            raise ValueError(
                f"{len(missing)} of {config.sampling.num} images are not in {folder} yet; make "
                f"them with: python scripts/sample.py {run.folder}{word}"
            )
    layers = json.loads(run.need("map.json", "quantize").read_text())["layers"]
    if any("bit_product" not in row for row in layers):
        remedy = f"make it again with: python scripts/quantize.py {run.folder} force=true"
        raise ValueError(f"{run.path('map.json')} is of an earlier version; {remedy}")
    with run.stage("evaluate"):
        full, quantized = (distribution(run, folder) for folder in folders.values())
        paired = paired_scores(*folders.values(), count=config.sampling.num)
        size = run.path("quantized.safetensors").stat().st_size
        metrics = {
            "protocol": {"asked": protocol, "scores": quantized["protocol"]},
            "float": {"scores": full["scores"]},
            "quantized": {"scores": quantized["scores"]},
            "paired": paired | distance_to_float(quantized, full),
            "sqnr_db_per_step": sqnr(run),
            "sizes": {"float_bytes": run.model.float_bytes, "quantized_bytes": size},
            "bit_operations": bit_operations(layers),
            "float_samples": f"../{folders['float'].name}",
        }
        write_text(path, json.dumps(metrics, indent=1))
    return f"{format_metrics(metrics)}\nevaluate: {path}"


def format_metrics(metrics: dict[str, Any]) -> str:
    """Returns the scores of a metrics.json as text."""
    asked, scored = metrics["protocol"]["asked"], metrics["protocol"]["scores"]
    s, psnr = asked["sampling"], metrics["paired"]["psnr_db"]
    sqnr_db = [row["sqnr_db"] for row in metrics["sqnr_db_per_step"]]
    lines = [scored["notice"]] if scored.get("notice") else []
    if not metrics["quantized"]["scores"]:
        lines.append(f"evaluate: {scored['left_out']}; PSNR, SSIM and SQNR only")
    lines.append(
        f"protocol: {s['num']} images, {s['sampler']} {s['steps']} {s['skip']} steps, eta "
        f"{s['eta']}, guidance {asked['guidance']['scale']}, {asked['weights']} weights, seed "
        f"{s['seed']}, reference {scored.get('reference')}, {scored.get('extractor')}, "
        f"{scored.get('tool')}"
    )
    for name, value in metrics["quantized"]["scores"].items():
        full = metrics["float"]["scores"][name]
        lines.append(f"{name:28} float {full:10.4f}   quantized {value:10.4f}")
    lines.append(
        f"same-seed PSNR {'of equal images' if psnr is None else f'{psnr:.2f} dB'}, SSIM "
        f"{metrics['paired']['ssim']:.4f}, mean SQNR of eps {sum(sqnr_db) / len(sqnr_db):.2f} dB"
    )
    return "\n".join(lines)


def distribution(run: Run, folder: Path) -> dict[str, Any]:
    """Returns distribution scores of one folder; of too few images none, and the reason."""
    e, num = run.config.evaluation, run.config.sampling.num
    if num < MIN_IMAGES:
        reason = f"{num} images are too few for scores of a distribution (at least {MIN_IMAGES})"
        return {"scores": {}, "protocol": {"count": num, "left_out": reason}}
    options = {key: value for key, value in vars(e).items() if key != "sqnr_images"}
    # full-precision images are shared with runs that may have asked for more of them
    options |= {"count": num, "keep_samples": folder.parent == run.folder.parent}
    return distribution_scores(folder, **options, kept=run.folder.parent, device=run.model.device)


def sqnr(run: Run) -> list[dict[str, float]]:
    """SQNR of eps by step along full-precision trajectories of `evaluation.sqnr_images` images."""
    s, num = run.config.sampling, run.config.evaluation.sqnr_images
    return step_sqnr(trajectory(run.model, s, num, s.seed), model_of(run, "auto").eps)

"""Score the images of a run folder:  python scripts/evaluate.py RUN [evaluation.reference=FOLDER] [force=true]

Writes RUN/metrics.json: distribution scores of quantized and full-precision images, the distance
between both, PSNR, SSIM and LPIPS between images of the same seed, SQNR of eps at every step, sizes
in bytes, bit operations, each with its protocol."""

import json
from dataclasses import asdict

from base.config import one_folder
from base.files import write_text
from evaluation.scores.cost import bit_operations
from evaluation.scores.distribution import MIN_IMAGES, distance_to_float, distribution_scores
from evaluation.scores.paired import paired_scores
from quant.analysis import step_sqnr
from tinydm.run_folder import open_run
from tinydm.stages.quantize import trajectory
from tinydm.stages.sample import model_of, sample_folder


def run(arguments):
    evaluate(open_run(*one_folder(arguments)))


def evaluate(run):
    config, path = run.config, run.path("metrics.json")
    protocol = {
        "model": config.name,
        "method": config.method,
        "bits": asdict(config.bits),
        "weights": config.weights,
        "sampling": asdict(config.sampling),
        "schedule": config.schedule,
        "guidance": asdict(config.guidance),
        "evaluation": asdict(config.evaluation),
        "provenance": config.provenance,
        "device": str(run.model.device),
    }
    if (
        path.exists()
        and not config.force
        and json.loads(path.read_text())["protocol"]["asked"] == protocol
    ):
        print(f"evaluate: done already, {path}")
        return
    folders = {"float": sample_folder(run, "float"), "quantized": sample_folder(run, "simulated")}
    for precision, folder in zip(("float", "simulated"), folders.values()):
        missing = [i for i in range(config.sampling.num) if not (folder / f"{i:06d}.png").exists()]
        if missing:
            raise ValueError(
                f"{len(missing)} of {config.sampling.num} images are not in {folder} yet; make "
                "them with: "
                f"python scripts/sample.py {run.folder} precision={precision}"
            )
    layers = json.loads(run.need("map.json", "quantize").read_text())["layers"]
    if any("bit_product" not in row for row in layers):
        raise ValueError(
            f"{run.path('map.json')} is of an earlier version; make it again with: python "
            f"scripts/quantize.py {run.folder} force=true"
        )
    with run.stage("evaluate"):
        results = {name: scores_of(run, folder) for name, folder in folders.items()}
        metrics = {
            "protocol": {"asked": protocol, "scores": results["quantized"]["protocol"]},
            "float": {"scores": results["float"]["scores"]},
            "quantized": {"scores": results["quantized"]["scores"]},
            "paired": paired_scores(*folders.values(), count=config.sampling.num)
            | distance_to_float(results["quantized"], results["float"]),
            "sqnr_db_per_step": sqnr(run),
            "sizes": {
                "float_bytes": run.model.float_bytes,
                "quantized_bytes": run.path("quantized.safetensors").stat().st_size,
            },
            "bit_operations": bit_operations(layers),
            "float_samples": f"../{folders['float'].name}",
        }
        write_text(path, json.dumps(metrics, indent=1))
    s = config.sampling
    print(
        f"protocol: {s.num} images, {s.sampler} {s.steps} {s.skip} steps, eta {s.eta}, guidance "
        f"{config.guidance.scale}, {config.weights} weights, seed {s.seed}, "
        f"reference {metrics['protocol']['scores'].get('reference')}, "
        f"{metrics['protocol']['scores'].get('extractor')}, "
        f"{metrics['protocol']['scores'].get('tool')}"
    )
    for name, value in metrics["quantized"]["scores"].items():
        print(f"{name:28} float {metrics['float']['scores'][name]:10.4f}   quantized {value:10.4f}")
    steps = metrics["sqnr_db_per_step"]
    psnr = metrics["paired"]["psnr_db"]
    print(
        f"same-seed PSNR {'of equal images' if psnr is None else f'{psnr:.2f} dB'}, SSIM "
        f"{metrics['paired']['ssim']:.4f}, mean SQNR of eps "
        f"{sum(r['sqnr_db'] for r in steps) / len(steps):.2f} dB"
    )
    print(f"evaluate: {path}")


def scores_of(run, folder):
    """Distribution scores of one folder; none, and the reason, where there are too few images."""
    e, num = run.config.evaluation, run.config.sampling.num
    if num < MIN_IMAGES:
        reason = f"{num} images are too few for scores of a distribution (at least {MIN_IMAGES})"
        print(f"evaluate: {reason}; PSNR, SSIM and SQNR only")
        return {"scores": {}, "protocol": {"count": num, "left_out": reason}}
    # A folder may hold more: full-precision images are shared with runs that asked for more of
    # them.
    found = distribution_scores(
        folder,
        count=num,
        extractor=e.extractor,
        inception_path=e.inception_path,
        fetch=e.fetch,
        reference=e.reference,
        device=run.model.device,
        kept=run.folder.parent,
        keep_samples=folder.parent == run.folder.parent,
    )
    if not found["scores"]:
        print(f"evaluate: {found['protocol']['left_out']}; PSNR, SSIM and SQNR only")
    return found


def sqnr(run):
    """SQNR of eps along the full-precision trajectories of `evaluation.sqnr_images` images, batch
    by batch."""
    quantized = model_of(run, "simulated")
    return step_sqnr(
        trajectory(run, run.config.evaluation.sqnr_images, run.config.sampling.seed), quantized.eps
    )

"""Quantize the model of a run folder:  python scripts/quantize.py RUN [memory_gb=8] [force=true]

Reads RUN/calibration.safetensors, writes RUN/quantized.safetensors, RUN/passes.jsonl (error before and after of each
unit), RUN/map.json and RUN/map.txt (what is quantized). Started again it goes on after the last finished unit.
"""
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quant.calibration import load_calibration  # noqa: E402
from quant.checkpoint import save_quantized  # noqa: E402
from quant.convert import convert, format_map, quantization_map, trace  # noqa: E402
from quant.files import write_text  # noqa: E402
from quant.passes import Job, run_passes  # noqa: E402
from scripts.cli import main  # noqa: E402
from scripts.run_folder import one_folder, open_run  # noqa: E402


def run(arguments):
    quantize(open_run(*one_folder(arguments)))


def quantize(run):
    path = run.path("quantized.safetensors")
    if path.exists() and not run.config.force:
        print(f"quantize: done already, {path}")
        return
    calibration = load_calibration(run.need("calibration.safetensors", "calibrate"))
    model = run.model
    with run.stage("quantize"):
        net = convert(model.net, run.config.rules)
        order = trace(model.net, calibration.arguments(slice(0, 1)))
        facts = quantization_map(model.net, net, order)
        write_text(run.path("map.json"), json.dumps(facts, indent=1))
        write_text(run.path("map.txt"), format_map(facts) + "\n")
        print(format_map(facts))
        job = Job(model=model, net=net, calibration=calibration, order=order, resume_folder=run.path("resume/quantize"),
                  seed=run.config.seed, log=lambda line: print(line, flush=True),
                  note=lambda rows: write_text(run.path("passes.jsonl"), "".join(json.dumps(r) + "\n" for r in rows)))
        run_passes(job, run.config.passes)
        save_quantized(path, net, run.recipe())
    run.finish("quantize")
    ratio = model.float_bytes / path.stat().st_size
    print(f"quantize: {path}, {path.stat().st_size:,} bytes, {ratio:.2f} x smaller than {model.float_bytes:,} of FP32")


if __name__ == "__main__":
    main(run)

"""Package a trained classifier as the offline extractor, with reference statistics of the training
images:

    python scripts/package_classifier.py run=FOLDER data=FOLDER [out=models/weights] \\
        [hardware=TEXT] [note=TEXT]

`run` is the folder of scripts/train.py, `data` as there. Writes cifar10-classifier.safetensors
(fp16 weights), cifar10-classifier-stats.safetensors (mean and covariance of the pooled and of the
spatial features, named as in the ADM evaluator's files, and the pooled features of 10,000 images)
and cifar10-classifier.json."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_fidelity.version import __version__ as fidelity_version

from base.config import load
from base.files import load_tensors, save_tensors, sha256, write_text
from evaluation.extractors.choice import build_extractor
from evaluation.extractors.features import extract_all
from evaluation.references import frechet
from evaluation.references.images import Reference
from evaluation.scores.frechet import DISTANCES
from evaluation.scores.inception_score import inception_score
from models.data import load_images

NAME = "cifar10-classifier"


@dataclass
class PackageConfig:
    run: str = ""
    data: str = "cifar10"
    out: str = "models/weights"
    hardware: str = ""  # what the classifier was trained on, for the record
    note: str = ""  # what a reader must know of the images


def package_weights(run: Path, path: Path) -> dict[str, Any]:
    """Copies the weights of a training run to `path`, self-describing; returns the record of the
    run. Raises ValueError where the training has not finished."""
    if not (run / "record.json").is_file():
        raise ValueError(
            f"{run} holds no finished training; make it with python scripts/train.py "
            "configs/train/cifar10-classifier.yaml out=FOLDER"
        )
    record = json.loads((run / "record.json").read_text())
    weights, _ = load_tensors(run / "weights.safetensors")
    save_tensors(path, weights, {"network": record["recipe"]["classifier"]})
    return record


def package(config: PackageConfig) -> dict[str, Any]:
    """Writes the three files; returns the record."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    weights_path, statistics_path = out / f"{NAME}.safetensors", out / f"{NAME}-stats.safetensors"
    record = package_weights(Path(config.run), weights_path)
    net = build_extractor("cifar-resnet", weights_path)
    scores, features = {}, {}
    for split in ("train", "test"):
        images, labels = load_images(config.data, split)
        features[split] = extract_all(net, images)
        right = features[split]["logits"].argmax(1) == labels
        accuracy = round(right.float().mean().item(), 4)
        scores[split] = {"count": len(images), "accuracy": accuracy}
        for name, value in inception_score(features[split], Reference({})).values.items():
            scores[split][net.score_name(name)] = value
    metadata = {
        "split": "cifar10 train",
        "note": config.note,
        "extractor": net.name,
        "extractor_sha256": sha256(weights_path),
        "features": "pooled, spatial",
        "pixels_sha256": features["train"]["sha256"],
        "tool": f"torch-fidelity {fidelity_version}",
    }
    metadata |= {key: value for key, value in scores["train"].items() if key != "accuracy"}
    frechet.write_statistics(statistics_path, features["train"], metadata)
    train, _, _ = frechet.read_statistics(statistics_path)
    test = frechet.statistics_of(features["test"])
    for name, kind in DISTANCES.items():
        distance = frechet.frechet_distance(test[kind], train[kind])
        scores["test"][net.score_name(name)] = distance
    for key in ("data", "out", "model"):
        record["recipe"].pop(key, None)
    record.update(
        hardware=config.hardware,
        note=config.note,
        seed=record["recipe"]["seed"],
        scores=scores,
        test_accuracy=scores["test"]["accuracy"],
        weights_sha256=metadata["extractor_sha256"],
        statistics_sha256=sha256(statistics_path),
    )
    write_text(out / f"{NAME}.json", json.dumps(record, indent=2) + "\n")
    return record


def run(arguments: list[str]) -> None:
    """Packages by a command line."""
    record = package(load(PackageConfig, [], arguments))
    distance = record["scores"]["test"]["FD-cifar-resnet"]
    print(f"test accuracy {record['test_accuracy']:.2%}, test FD-cifar-resnet {distance:.3f}")

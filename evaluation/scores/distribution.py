"""Scores of a folder of images as a distribution, by torch-fidelity, each with its protocol."""

from pathlib import Path
from typing import Any

from torch_fidelity.version import __version__ as fidelity_version

from base.devices import Device
from base.files import sha256
from evaluation.extractors.choice import EXTRACTORS, build_extractor, choose_extractor
from evaluation.extractors.features import Source, extract_once
from evaluation.references.images import MIN_IMAGES, find_reference
from evaluation.scores.frechet import frechet_distances
from evaluation.scores.inception_score import inception_score
from evaluation.scores.neighbours import neighbour_scores
from models.data import image_files, read_image

# In the field's order. A new score is a function in a file of its own, and its row here: features
# of the samples as `extract_all` gives them, and the Reference -> Score.
SCORES = (frechet_distances, inception_score, neighbour_scores)


def distribution_scores(
    samples_dir: Path | str,
    *,
    count: int | None = None,
    extractor: str = "auto",
    inception_path: str = "",
    fetch: bool = False,
    reference: str = "",
    kept: Path | str = "",
    keep_samples: bool = False,
    batch_size: int = 256,
    device: Device = "cpu",
) -> dict[str, Any]:
    """Score the images in a folder, or the first `count` of them -> {"scores": {name: number},
    "protocol": {...}, "features": pooled ones (N, D)}.

    extractor: auto, inception or cifar-resnet. `auto` takes Inception where its weights are found;
        where not, protocol["notice"] says so.
    inception_path: file of the Inception weights; "" = torch hub's cache, into which they may be
        downloaded with `fetch`.
    reference: folder of images, cifar10-train[:FOLDER], or "" = statistics that ship with the
        extractor, if any.
    kept: folder where features of the reference stay for the next call, and with `keep_samples`
        those of the samples; "" = nowhere.

    Raises ValueError for fewer than MIN_IMAGES images, and for images of several sizes."""
    name, weights, notice = choose_extractor(extractor, inception_path, fetch=fetch)
    files = image_files(samples_dir)[:count]
    if len(files) < MIN_IMAGES:
        raise ValueError(
            f"{samples_dir} holds {len(files)} images but scores of a distribution need at least "
            f"{MIN_IMAGES}; sample more of them"
        )
    height, width = read_image(files[0]).shape[1:]
    size, side = f"{width}x{height}", EXTRACTORS[name].image_size
    if extractor == "auto" and side and (height, width) != (side, side):
        reason = (
            f"without Inception weights only {side}x{side} images have scores of a distribution, "
            f"these are {size}; fetch the weights with evaluation.fetch=true or name them with "
            "evaluation.inception_path=FILE"
        )
        protocol = {"count": len(files), "image_size": size, "notice": notice, "left_out": reason}
        return {"scores": {}, "protocol": protocol}
    net = build_extractor(name, weights, device)

    def extract(source: Source, folder: Path | str = kept) -> dict[str, Any]:
        return extract_once(folder, net, source, batch_size=batch_size, device=device)

    samples = extract(files, kept if keep_samples else "")
    real = find_reference(net, reference, samples["size"], extract)
    protocol = {
        "count": len(files),
        "image_size": samples["size"],
        "image_format": "+".join(sorted({path.suffix.lower()[1:] for path in files})),
        "samples_sha256": samples["sha256"],
        "extractor": name,
        "extractor_sha256": sha256(weights),
        **real.protocol,
        "tool": f"torch-fidelity {fidelity_version}",
    }
    scores, left_out = {}, {}
    for score in SCORES:
        found = score(samples, real)
        scores |= {net.score_name(key): value for key, value in found.values.items()}
        left_out |= found.left_out
        protocol |= found.protocol
    protocol |= {"notice": notice, "left_out": left_out}
    return {"scores": scores, "protocol": protocol, "features": samples["pooled"]}

"""Scores of image folders: distribution scores by torch-fidelity's formulas, PSNR, SSIM and LPIPS
of pairs, SQNR of tensors, bit operations of a network.

Every distribution score comes with its protocol. A score that the images at hand cannot support is
left out with the reason, never replaced: Frechet distances need more images than features for a
covariance of full rank."""

from pathlib import Path

from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import (
    KEY_METRIC_ISC_MEAN,
    KEY_METRIC_ISC_STD,
    isc_features_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.version import __version__ as fidelity_version

from evaluation.extractors.choice import build_extractor, choose_extractor
from evaluation.extractors.cifar_resnet import WEIGHTS, sha256
from evaluation.extractors.features import extract_once
from evaluation.references.frechet import (
    STATISTICS,
    frechet_distance,
    read_statistics,
    statistics_of,
)
from models.data import image_files, load_images, read_image

# ten splits of ten for IS, and neighbourhoods that mean something
MIN_IMAGES = 100
DISTANCES = {"FD": "pooled", "sFD": "spatial"}  # Frechet distances and their features
# torch-fidelity's default; smaller sets are used whole (see the protocol)
KID_SUBSET_SIZE = 1000


def distribution_scores(
    samples_dir,
    *,
    count=None,
    extractor="auto",  # auto | inception | cifar-resnet
    # file of the Inception weights; "" = torch hub's cache
    inception_path="",
    fetch=False,  # may the Inception weights be downloaded?
    # image folder | cifar10-train[:FOLDER] | "" = shipped statistics
    reference="",
    # folder where features of the reference stay for the next call
    kept="",
    keep_samples=False,  # and those of the samples
    batch_size=256,
    device="cpu",
):
    """-> {"scores": {name: number}, "protocol": {...}, "features": (N, D) pooled ones} of the
    images in a folder, or the first `count` of them."""
    name, weights_path, notice = choose_extractor(extractor, inception_path, fetch=fetch)
    if notice:
        print(notice, flush=True)
    files = image_files(samples_dir)[:count]
    if len(files) < MIN_IMAGES:
        raise ValueError(
            f"{samples_dir} holds {len(files)} images but scores of a distribution need at least "
            f"{MIN_IMAGES}; sample more of them"
        )
    height, width = read_image(files[0]).shape[1:]
    if extractor == "auto" and name == "cifar-resnet" and (height, width) != (32, 32):
        return {
            "scores": {},
            "protocol": {
                "count": len(files),
                "image_size": f"{width}x{height}",
                "left_out": "without Inception weights only 32x32 images have scores of a "
                "distribution, these are "
                f"{width}x{height}; fetch the weights with evaluation.fetch=true or name them with "
                "evaluation.inception_path=FILE",
            },
        }
    net = build_extractor(name, weights_path, device)

    def features_of(source, folder=kept):
        return extract_once(
            folder, net, name, weights_path, source, batch_size=batch_size, device=device
        )

    samples = features_of(files, kept if keep_samples else "")
    real, statistics, described = _reference(name, reference, samples["size"], features_of)
    scores, left_out, kid_subset_size = _scores(samples, real, statistics)
    protocol = {
        "count": len(files),
        "image_size": samples["size"],
        "image_format": "+".join(sorted({path.suffix.lower()[1:] for path in files})),
        "samples_sha256": samples["sha256"],
        "extractor": name,
        "extractor_sha256": sha256(weights_path),
        **described,
        "tool": f"torch-fidelity {fidelity_version}",
        "is_splits": 10,
        "neighbours_among": None if real is None else len(real),
        "kid_subset_size": kid_subset_size,
        "notice": notice,
        "left_out": left_out,
    }
    return {
        "scores": {_named(score, name): value for score, value in scores.items()},
        "protocol": protocol,
        "features": samples["pooled"],
    }


def distance_to_float(quantized, full_precision):
    """-> {"FID to FP32": number}, or of whichever Frechet distance the two results of
    `distribution_scores` hold: that between the images themselves. It needs no reference and is 0
    for equal images, where the FD to a reference can fall by an error that happens to please it.
    Nothing where there are too few images."""
    names = [name for name in quantized["scores"] if name.split("-")[0] in ("FID", "FD")]
    return {
        f"{name} to FP32": frechet_distance(
            *(
                fid_features_to_statistics(found["features"].double())
                for found in (quantized, full_precision)
            )
        )
        for name in names
    }


def _named(score, extractor):
    """Published names belong to Inception; with any other extractor its name is part of the
    score's."""
    if extractor == "inception":
        return {"FD": "FID", "sFD": "sFID"}.get(score, score)
    score, dash, std = score.partition("-std")
    return f"{score}-{extractor}{dash}{std}"


def _reference(name, reference, size, features_of):
    """-> pooled features of the reference or None, its statistics by feature, what the protocol
    says of it."""
    if not reference and name != "cifar-resnet":
        return None, {}, {"reference": None, "reference_count": 0, "reference_sha256": None}
    if not reference:
        statistics, pooled, facts = read_statistics()
        if facts["extractor_sha256"] != sha256(WEIGHTS):
            raise ValueError(
                f"{STATISTICS.name} was made with other weights than {WEIGHTS.name}; make both "
                "again with "
                "python scripts/package_classifier.py"
            )
        return (
            pooled,
            statistics,
            {
                "reference": f"{STATISTICS.name} ({facts['split']}; {facts['note']})",
                "reference_count": facts["count"],
                "reference_sha256": sha256(STATISTICS),
            },
        )
    if reference.split(":")[0] == "cifar10-train":
        source, reference = (
            load_images(reference.replace("cifar10-train", "cifar10", 1), "train")[0],
            "cifar10-train",
        )
    else:
        folder = Path(reference)
        source = image_files(folder / "train" if (folder / "train").is_dir() else folder)
    real = features_of(source)
    if real["size"] != size:
        raise ValueError(
            f"samples are {size} but the reference {reference} is {real['size']}; prepare the "
            "reference "
            "the way the training images were"
        )
    if len(source) < MIN_IMAGES:
        raise ValueError(
            f"the reference {reference} holds {len(source)} images but at least {MIN_IMAGES} are "
            "needed; "
            "add images"
        )
    described = {
        "reference": str(reference),
        "reference_count": len(source),
        "reference_sha256": real["sha256"],
    }
    return real["pooled"], statistics_of(real), described


def _scores(samples, real, statistics):
    """-> scores in the field's order, {score: why it was left out}, images in one subset of KID."""
    pooled, scores, left_out = samples["pooled"], {}, {}
    fewest = len(pooled) if real is None else min(len(pooled), len(real))
    for score, key in DISTANCES.items():
        if key not in statistics:
            left_out[score] = (
                f"no reference of {key} features was given: evaluation.reference=FOLDER or "
                "evaluation.reference=cifar10-train"
            )
        elif fewest <= samples[key].shape[1]:
            left_out[score] = (
                f"{fewest} images cannot give a covariance of {samples[key].shape[1]} features "
                "full rank"
            )
        else:
            scores[score] = frechet_distance(
                fid_features_to_statistics(samples[key].double()), statistics[key]
            )
    found = isc_features_to_metric(samples["logits"])
    scores["IS"], scores["IS-std"] = found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
    if real is None:
        left_out["KID, precision, recall"] = (
            "they need the images of a reference: evaluation.reference=FOLDER"
        )
        return scores, left_out, None
    found = prc_features_to_metric(
        pooled, real, save_cpu_ram=True, prc_batch_size=2000, verbose=False
    )
    scores["precision"], scores["recall"] = found["precision"], found["recall"]
    subset_size = min(KID_SUBSET_SIZE, fewest)
    found = kid_features_to_metric(pooled, real, kid_subset_size=subset_size, verbose=False)
    scores["KID"], scores["KID-std"] = found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
    return scores, left_out, subset_size

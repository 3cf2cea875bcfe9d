"""Scores of image folders: distribution scores by torch-fidelity's formulas, PSNR, SSIM and LPIPS of pairs, SQNR of
tensors, bit operations of a network.

Every distribution score comes with its protocol. A score that the images at hand cannot support is left out with the
reason, never replaced: Frechet distances need more images than features for a covariance of full rank.
"""
from pathlib import Path

import torch
import torch.nn.functional as F
from torch_fidelity.metric_fid import fid_features_to_statistics
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.version import __version__ as fidelity_version
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from evaluation.classifier import MEAN, STD
from evaluation.features import WEIGHTS, build_extractor, choose_extractor, extract_once, load_classifier, sha256
from evaluation.reference import STATISTICS, frechet_distance, read_statistics, statistics_of
from models.data import image_files, load_images, read_image

MIN_IMAGES = 100                            # ten splits of ten for IS, and neighbourhoods that mean something
LPIPS = "LPIPS-cifar-resnet"
VALUES_AT_ONCE = 2 ** 20                    # of images compared pair by pair, which SSIM takes a hundred bytes each for
DISTANCES = {"FD": "pooled", "sFD": "spatial"}          # Frechet distances and their features
KID_SUBSET_SIZE = 1000                      # torch-fidelity's default; smaller sets are used whole (see the protocol)


def distribution_scores(samples_dir, *, count=None,
                        extractor="auto",          # auto | inception | cifar-resnet
                        inception_path="",         # file of the Inception weights; "" = torch hub's cache
                        fetch=False,               # may the Inception weights be downloaded?
                        reference="",              # image folder | cifar10-train[:FOLDER] | "" = shipped statistics
                        kept="",                   # folder where features of the reference stay for the next call
                        keep_samples=False,        # and those of the samples
                        batch_size=256, device="cpu"):
    """-> {"scores": {name: number}, "protocol": {...}, "features": (N, D) pooled ones} of the images in a folder, or
    the first `count` of them."""
    name, weights_path, notice = choose_extractor(extractor, inception_path, fetch=fetch)
    if notice:
        print(notice, flush=True)
    files = image_files(samples_dir)[:count]
    if len(files) < MIN_IMAGES:
        raise ValueError(f"{samples_dir} holds {len(files)} images but scores of a distribution need at least "
                         f"{MIN_IMAGES}; sample more of them")
    height, width = read_image(files[0]).shape[1:]
    if extractor == "auto" and name == "cifar-resnet" and (height, width) != (32, 32):
        return {"scores": {}, "protocol": {"count": len(files), "image_size": f"{width}x{height}", "left_out":
                f"without Inception weights only 32x32 images have scores of a distribution, these are "
                f"{width}x{height}; fetch the weights with evaluation.fetch=true or name them with "
                "evaluation.inception_path=FILE"}}
    net = build_extractor(name, weights_path, device)

    def features_of(source, folder=kept):
        return extract_once(folder, net, name, weights_path, source, batch_size=batch_size, device=device)
    samples = features_of(files, kept if keep_samples else "")
    real, statistics, described = _reference(name, reference, samples["size"], features_of)
    scores, left_out, kid_subset_size = _scores(samples, real, statistics)
    protocol = {"count": len(files), "image_size": samples["size"],
                "image_format": "+".join(sorted({path.suffix.lower()[1:] for path in files})),
                "samples_sha256": samples["sha256"], "extractor": name, "extractor_sha256": sha256(weights_path),
                **described, "tool": f"torch-fidelity {fidelity_version}", "is_splits": 10,
                "neighbours_among": None if real is None else len(real), "kid_subset_size": kid_subset_size,
                "notice": notice, "left_out": left_out}
    return {"scores": {_named(score, name): value for score, value in scores.items()}, "protocol": protocol,
            "features": samples["pooled"]}


def distance_to_float(quantized, full_precision):
    """-> {"FID to FP32": number}, or of whichever Frechet distance the two results of `distribution_scores` hold: that
    between the images themselves. It needs no reference and is 0 for equal images, where the FD to a reference can fall
    by an error that happens to please it. Nothing where there are too few images."""
    names = [name for name in quantized["scores"] if name.split("-")[0] in ("FID", "FD")]
    return {f"{name} to FP32": frechet_distance(*(fid_features_to_statistics(found["features"].double())
                                                  for found in (quantized, full_precision))) for name in names}


def _named(score, extractor):
    """Published names belong to Inception; with any other extractor its name is part of the score's."""
    if extractor == "inception":
        return {"FD": "FID", "sFD": "sFID"}.get(score, score)
    score, dash, std = score.partition("-std")
    return f"{score}-{extractor}{dash}{std}"


def _reference(name, reference, size, features_of):
    """-> pooled features of the reference or None, its statistics by feature, what the protocol says of it."""
    if not reference and name != "cifar-resnet":
        return None, {}, {"reference": None, "reference_count": 0, "reference_sha256": None}
    if not reference:
        statistics, pooled, facts = read_statistics()
        if facts["extractor_sha256"] != sha256(WEIGHTS):
            raise ValueError(f"{STATISTICS.name} was made with other weights than {WEIGHTS.name}; make both again with "
                             "python -m evaluation.reference")
        return pooled, statistics, {"reference": f"{STATISTICS.name} ({facts['split']}; {facts['note']})",
                                    "reference_count": facts["count"], "reference_sha256": sha256(STATISTICS)}
    if reference.split(":")[0] == "cifar10-train":
        source, reference = load_images(reference.replace("cifar10-train", "cifar10", 1), "train")[0], "cifar10-train"
    else:
        folder = Path(reference)
        source = image_files(folder / "train" if (folder / "train").is_dir() else folder)
    real = features_of(source)
    if real["size"] != size:
        raise ValueError(f"samples are {size} but the reference {reference} is {real['size']}; prepare the reference "
                         "the way the training images were")
    if len(source) < MIN_IMAGES:
        raise ValueError(f"the reference {reference} holds {len(source)} images but at least {MIN_IMAGES} are needed; "
                         "add images")
    described = {"reference": str(reference), "reference_count": len(source), "reference_sha256": real["sha256"]}
    return real["pooled"], statistics_of(real), described


def _scores(samples, real, statistics):
    """-> scores in the field's order, {score: why it was left out}, images in one subset of KID."""
    pooled, scores, left_out = samples["pooled"], {}, {}
    fewest = len(pooled) if real is None else min(len(pooled), len(real))
    for score, key in DISTANCES.items():
        if key not in statistics:
            left_out[score] = (f"no reference of {key} features was given: evaluation.reference=FOLDER or "
                                "evaluation.reference=cifar10-train")
        elif fewest <= samples[key].shape[1]:
            left_out[score] = f"{fewest} images cannot give a covariance of {samples[key].shape[1]} features full rank"
        else:
            scores[score] = frechet_distance(fid_features_to_statistics(samples[key].double()), statistics[key])
    found = isc_features_to_metric(samples["logits"])
    scores["IS"], scores["IS-std"] = found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
    if real is None:
        left_out["KID, precision, recall"] = "they need the images of a reference: evaluation.reference=FOLDER"
        return scores, left_out, None
    found = prc_features_to_metric(pooled, real, save_cpu_ram=True, prc_batch_size=2000, verbose=False)
    scores["precision"], scores["recall"] = found["precision"], found["recall"]
    subset_size = min(KID_SUBSET_SIZE, fewest)
    found = kid_features_to_metric(pooled, real, kid_subset_size=subset_size, verbose=False)
    scores["KID"], scores["KID-std"] = found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]
    return scores, left_out, subset_size


def _check_pair(a, b):
    if a.shape != b.shape:
        raise ValueError(f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ; give two batches of the same shape")


def psnr_db(a, b):
    """Peak signal-to-noise ratio of each pair in uint8 batches (N, 3, H, W) -> (N,); infinite for equal images."""
    _check_pair(a, b)
    return peak_signal_noise_ratio(a.double(), b.double(), data_range=255.0, dim=(1, 2, 3), reduction="none")


def ssim(a, b):
    """Structural similarity (Wang et al. 2004: Gaussian window 11x11, sigma 1.5) of each pair in uint8 batches
    (N, 3, H, W) -> (N,), averaged over the three channels and all pixels, the image reflected at its edges."""
    _check_pair(a, b)
    if min(a.shape[2:]) < 11:
        raise ValueError(f"images are {a.shape[3]}x{a.shape[2]} but SSIM's window is 11x11; give larger images")
    _, at = structural_similarity_index_measure(a.double(), b.double(), data_range=255.0, reduction="none",
                                                return_full_image=True)      # what the mean leaves out has changed
    return at.mean((1, 2, 3))


@torch.no_grad()
def lpips(net, a, b):
    """Perceptual distance of each pair in uint8 batches (N, 3, H, W) -> (N,), 0 for equal images. LPIPS (Zhang et al.
    2018, arXiv:1801.03924, Eq. 1) with the CIFAR-10 classifier `net` as the network and every w_l = 1: the distance of
    unit-length channel vectors, averaged over places, summed over the stem and the stages."""
    _check_pair(a, b)
    distance = 0
    for y, y0 in zip(_layers(net, a), _layers(net, b)):
        difference = F.normalize(y, dim=1, eps=1e-10) - F.normalize(y0, dim=1, eps=1e-10)
        distance = distance + difference.square().sum(1).mean((1, 2))
    return distance


def _layers(net, images):
    x = net.stem((images.float() / 255 - MEAN) / STD)
    yield x
    for stage in net.stages:
        x = stage(x)
        yield x


def bit_operations(layers):
    """-> {"float", "quantized"}: bit operations of one image and run of the network (guidance takes two a step), from
    the layers of map.json: the sum over layers and attention products of multiply-adds x bits of one operand x bits of
    the other (`bit_product`; where widths differ by time, its mean over the sampler's steps), 32 x 32 in full
    precision."""
    return {"float": sum(row["macs"] for row in layers) * 32 * 32,
            "quantized": sum(row["macs"] * row["bit_product"] for row in layers)}


def paired_scores(dir_a, dir_b, *, count=None):
    """Means over the PNGs with the same name in both folders, among the first `count` of each. Equal pairs have no
    finite PSNR: they are counted as `identical` and left out of the mean of `psnr_db`, which is None if none differ.
    LPIPS is None for images of another size than the 32x32 that its network was trained on."""
    names_a, names_b = (set(sorted(path.name for path in Path(folder).glob("*.png"))[:count])
                        for folder in (dir_a, dir_b))
    names = sorted(names_a & names_b)
    if not names:
        raise ValueError(f"no PNG has the same name in {dir_a} and {dir_b}; sample both from the same seeds")
    psnr, similarity, perceptual, net = [], [], [], load_classifier()
    each = max(1, VALUES_AT_ONCE // read_image(Path(dir_a) / names[0])[0].numel())
    for start in range(0, len(names), each):
        part = names[start:start + each]
        pairs = [(read_image(Path(dir_a) / name), read_image(Path(dir_b) / name)) for name in part]
        for name, (a, b) in zip(part, pairs):
            if a.shape != b.shape or a.shape != pairs[0][0].shape:
                raise ValueError(f"{name} is {a.shape[2]}x{a.shape[1]} in {dir_a} and {b.shape[2]}x{b.shape[1]} in "
                                 f"{dir_b}; all images must have one size")
        a, b = (torch.stack(images) for images in zip(*pairs))
        psnr.append(psnr_db(a, b))
        similarity.append(ssim(a, b))
        perceptual += [lpips(net, a, b)] if a.shape[2:] == (32, 32) else []
    psnr = torch.cat(psnr)
    finite = psnr[psnr.isfinite()]
    return {"psnr_db": finite.mean().item() if len(finite) else None, "ssim": torch.cat(similarity).mean().item(),
            LPIPS: torch.cat(perceptual).mean().item() if perceptual else None,
            "count": len(names), "identical": len(psnr) - len(finite), "unpaired": len(names_a ^ names_b)}

"""PSNR, SSIM and LPIPS of images of the same seed."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from evaluation.extractors.cifar_resnet import load_classifier
from evaluation.extractors.classifier import MEAN, STD
from models.data import read_image

LPIPS = "LPIPS-cifar-resnet"
# of images compared pair by pair, which SSIM takes a hundred bytes each for
VALUES_AT_ONCE = 2**20


def _check_pair(a, b):
    if a.shape != b.shape:
        raise ValueError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ; give two batches of the same "
            "shape"
        )


def psnr_db(a, b):
    """Peak signal-to-noise ratio of each pair in uint8 batches (N, 3, H, W) -> (N,); infinite for
    equal images."""
    _check_pair(a, b)
    return peak_signal_noise_ratio(
        a.double(), b.double(), data_range=255.0, dim=(1, 2, 3), reduction="none"
    )


def ssim(a, b):
    """Structural similarity (Wang et al. 2004: Gaussian window 11x11, sigma 1.5) of each pair in
    uint8 batches (N, 3, H, W) -> (N,), averaged over the three channels and all pixels, the image
    reflected at its edges."""
    _check_pair(a, b)
    if min(a.shape[2:]) < 11:
        raise ValueError(
            f"images are {a.shape[3]}x{a.shape[2]} but SSIM's window is 11x11; give larger images"
        )
    _, at = structural_similarity_index_measure(
        a.double(),
        b.double(),
        data_range=255.0,
        reduction="none",
        # what the mean leaves out has changed
        return_full_image=True,
    )
    return at.mean((1, 2, 3))


@torch.no_grad()
def lpips(net, a, b):
    """Perceptual distance of each pair in uint8 batches (N, 3, H, W) -> (N,), 0 for equal images.
    LPIPS (Zhang et al. 2018, arXiv:1801.03924, Eq. 1) with the CIFAR-10 classifier `net` as the
    network and every w_l = 1: the distance of unit-length channel vectors, averaged over places,
    summed over the stem and the stages."""
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


def paired_scores(dir_a, dir_b, *, count=None):
    """Means over the PNGs with the same name in both folders, among the first `count` of each.
    Equal pairs have no finite PSNR: they are counted as `identical` and left out of the mean of
    `psnr_db`, which is None if none differ. LPIPS is None for images of another size than the 32x32
    that its network was trained on."""
    names_a, names_b = (
        set(sorted(path.name for path in Path(folder).glob("*.png"))[:count])
        for folder in (dir_a, dir_b)
    )
    names = sorted(names_a & names_b)
    if not names:
        raise ValueError(
            f"no PNG has the same name in {dir_a} and {dir_b}; sample both from the same seeds"
        )
    psnr, similarity, perceptual, net = [], [], [], load_classifier()
    each = max(1, VALUES_AT_ONCE // read_image(Path(dir_a) / names[0])[0].numel())
    for start in range(0, len(names), each):
        part = names[start : start + each]
        pairs = [(read_image(Path(dir_a) / name), read_image(Path(dir_b) / name)) for name in part]
        for name, (a, b) in zip(part, pairs):
            if a.shape != b.shape or a.shape != pairs[0][0].shape:
                raise ValueError(
                    f"{name} is {a.shape[2]}x{a.shape[1]} in {dir_a} and "
                    f"{b.shape[2]}x{b.shape[1]} in "
                    f"{dir_b}; all images must have one size"
                )
        a, b = (torch.stack(images) for images in zip(*pairs))
        psnr.append(psnr_db(a, b))
        similarity.append(ssim(a, b))
        perceptual += [lpips(net, a, b)] if a.shape[2:] == (32, 32) else []
    psnr = torch.cat(psnr)
    finite = psnr[psnr.isfinite()]
    return {
        "psnr_db": finite.mean().item() if len(finite) else None,
        "ssim": torch.cat(similarity).mean().item(),
        LPIPS: torch.cat(perceptual).mean().item() if perceptual else None,
        "count": len(names),
        "identical": len(psnr) - len(finite),
        "unpaired": len(names_a ^ names_b),
    }

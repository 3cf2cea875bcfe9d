"""PSNR, SSIM and LPIPS of images of the same seed."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics.functional import image as metrics

from evaluation.extractors.cifar_resnet import load_classifier
from evaluation.extractors.classifier import MEAN, STD, Classifier
from models.data import read_image

LPIPS = "LPIPS-cifar-resnet"
Pairs = Iterable[tuple[torch.Tensor, torch.Tensor]]  # batches of both, uint8 (N, 3, H, W)
# pixels of the images compared at once; SSIM takes hundreds of bytes for each
VALUES_AT_ONCE = 2**20


def compare_images(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Compare two batches of uint8 images (N, 3, H, W) pair by pair -> means over all pairs:
    psnr_db, ssim, LPIPS-cifar-resnet, and the numbers of pairs in all (`count`) and of equal ones
    (`identical`).

    Equal images have no finite PSNR; they are left out of the mean of psnr_db, which is None if
    none differ. LPIPS is None for images of another size than the 32x32 that its network was
    trained on. Raises ValueError for batches of different shapes, empty ones, and other types."""
    _check_pair(a, b)
    if not len(a) or a.dtype != torch.uint8 or b.dtype != torch.uint8:
        remedy = "give at least one image, uint8"
        raise ValueError(f"found {tuple(a.shape)} of {a.dtype} and {b.dtype}; {remedy}")
    each = pairs_at_once(a[0])
    return pair_scores(zip(a.split(each), b.split(each)))


def paired_scores(
    dir_a: Path | str, dir_b: Path | str, *, count: int | None = None
) -> dict[str, Any]:
    """What `compare_images` says of the PNGs with the same name in both folders, among the first
    `count` of each, and the number of those without a partner (`unpaired`). Raises ValueError
    where there are none or sizes differ."""
    both = [sorted(path.name for path in Path(d).glob("*.png"))[:count] for d in (dir_a, dir_b)]
    names_a, names_b = map(set, both)
    names = sorted(names_a & names_b)
    if not names:
        remedy = "sample both from the same seeds"
        raise ValueError(f"no PNG has the same name in {dir_a} and {dir_b}; {remedy}")
    return pair_scores(_read_pairs(dir_a, dir_b, names)) | {"unpaired": len(names_a ^ names_b)}


def pair_scores(batches: Pairs) -> dict[str, Any]:
    """What `compare_images` says of all pairs in these batches together."""
    psnr, similarity, perceptual, net = [], [], [], load_classifier()
    for a, b in batches:
        psnr.append(psnr_db(a, b))
        similarity.append(ssim(a, b))
        if a.shape[2:] == (32, 32):
            perceptual.append(lpips(net, a, b))
    psnr = torch.cat(psnr)
    finite = psnr[psnr.isfinite()]
    return {
        "psnr_db": finite.mean().item() if len(finite) else None,
        "ssim": torch.cat(similarity).mean().item(),
        LPIPS: torch.cat(perceptual).mean().item() if perceptual else None,
        "count": len(psnr),
        "identical": len(psnr) - len(finite),
    }


def pairs_at_once(image: torch.Tensor) -> int:
    """How many pairs of images like `image` (3, H, W) are compared at once."""
    return max(1, VALUES_AT_ONCE // image[0].numel())


def _read_pairs(dir_a: Path | str, dir_b: Path | str, names: list[str]) -> Pairs:
    each = pairs_at_once(read_image(Path(dir_a) / names[0]))
    for start in range(0, len(names), each):
        part = names[start : start + each]
        pairs = [(read_image(Path(dir_a) / name), read_image(Path(dir_b) / name)) for name in part]
        for name, (a, b) in zip(part, pairs):
            if a.shape != b.shape or a.shape != pairs[0][0].shape:
                raise ValueError(
                    f"{name} is {a.shape[2]}x{a.shape[1]} in {dir_a} and "
                    f"{b.shape[2]}x{b.shape[1]} in {dir_b}; all images must have one size"
                )
        a, b = (torch.stack(images) for images in zip(*pairs))
        yield a, b


def psnr_db(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """PSNR in dB of each pair in uint8 batches (N, 3, H, W) -> (N,); infinite for equal images."""
    _check_pair(a, b)
    options = {"data_range": 255.0, "dim": (1, 2, 3), "reduction": "none"}
    return metrics.peak_signal_noise_ratio(a.double(), b.double(), **options)


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM (Wang et al. 2004: Gaussian window 11x11, sigma 1.5) of each pair in uint8 batches
    (N, 3, H, W) -> (N,), averaged over channels and all pixels, edges reflected."""
    _check_pair(a, b)
    if min(a.shape[2:]) < 11:
        raise ValueError(
            f"images are {a.shape[3]}x{a.shape[2]} but SSIM's window is 11x11; give larger images"
        )
    # Versions of the library differ in what their own mean leaves out, so it is taken here.
    options = {"data_range": 255.0, "reduction": "none", "return_full_image": True}
    _, by_pixel = metrics.structural_similarity_index_measure(a.double(), b.double(), **options)
    return by_pixel.mean((1, 2, 3))


@torch.no_grad()
def lpips(net: Classifier, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
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


def _layers(net: Classifier, images: torch.Tensor) -> Iterator[torch.Tensor]:
    x = net.stem((images.float() / 255 - MEAN) / STD)
    yield x
    for stage in net.stages:
        x = stage(x)
        yield x


def _check_pair(a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        found = f"shapes {tuple(a.shape)} and {tuple(b.shape)} differ"
        raise ValueError(f"{found}; give two batches of the same shape")

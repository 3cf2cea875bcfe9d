"""Training images: torchvision's CIFAR-10 or any folder of images, as one uint8 tensor."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def image_files(folder: Path | str) -> list[Path]:
    """Lists the image files under `folder` by name. Raises ValueError if there are none."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"image folder {folder} does not exist")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"image folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}); "
            "give a folder of images or of class folders"
        )
    return files


def read_image(path: Path | str, size: int | None = None) -> torch.Tensor:
    """Reads an RGB image (3, H, W) uint8; with `size` it is cropped to its central square and
    resized to that many pixels a side. Raises ValueError for a file that is none."""
    try:
        image = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError):
        raise ValueError(f"{path} is not a readable image; remove or replace it") from None
    if size and image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def load_images(
    data: str,
    split: str = "train",
    size: int = 32,
    choose: Callable[[int], Sequence[int]] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loads images (N, 3, size, size) uint8 and their labels (N,) int64.

    `data` is a folder with `train`/`test` class folders, a folder of class folders or of images
    (labels then 0), or "cifar10" / "cifar10:FOLDER": torchvision's download, checked by its MD5.
    Labels number the sorted class folders. `choose`, a function of how many there are, says which
    of them are wanted, by their indices; no others are read."""
    if str(data).split(":")[0] == "cifar10":
        # takes seconds to import, and most have no use for it
        from torchvision.datasets import CIFAR10

        root = str(data).partition(":")[2] or "data"
        try:
            source = CIFAR10(root, train=split == "train", download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"CIFAR-10 could not be fetched into {root} ({error}); "
                "give data=FOLDER with train/ and test/ class folders of images"
            ) from None
        rows = choose(len(source.data)) if choose else slice(None)
        images = torch.from_numpy(source.data[rows]).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(source.targets)[rows]
    folder = Path(data)
    folder = folder / split if (folder / split).is_dir() else folder
    files = image_files(folder)
    classes = sorted({p.parent for p in files})
    files = [files[i] for i in choose(len(files))] if choose else files
    images = torch.stack([read_image(p, size) for p in files])
    return images, torch.tensor([classes.index(p.parent) for p in files])

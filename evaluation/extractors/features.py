"""Features of images, for the scores of a distribution."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from base.devices import Device
from base.files import alone, load_tensors, save_tensors, sha256
from base.hooks import watching
from evaluation.extractors.extractor import Extractor
from models.data import read_image

SPATIAL_CHANNELS = 7
Source = Sequence[Path] | torch.Tensor  # image files, or uint8 images (N, 3, H, W)
# such images -> pooled features and logits
Network = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def image_batches(source: Source, batch_size: int) -> Iterator[torch.Tensor]:
    """Images in uint8 batches (N, 3, H, W). Raises ValueError if they do not all have one size."""
    size = None
    for start in range(0, len(source), batch_size):
        part = source[start : start + batch_size]
        if torch.is_tensor(part):
            yield part
            continue
        images = [read_image(path) for path in part]
        size = size or images[0].shape
        for path, image in zip(part, images):
            if image.shape != size:
                raise ValueError(
                    f"{path} is {image.shape[2]}x{image.shape[1]} but {source[0].name} is "
                    f"{size[2]}x{size[1]}; images scored together must have one size"
                )
        yield torch.stack(images)


@torch.no_grad()
def extract(
    net: Network, source: Source, *, batch_size: int = 256, device: Device = "cpu"
) -> dict[str, Any]:
    """Features of images -> {pooled (N, D), logits (N, C), size "WxH", sha256 of pixels}."""
    pooled, logits, digest = [], [], hashlib.sha256()
    for images in image_batches(source, batch_size):
        digest.update(images.numpy().tobytes())
        features = net(images.to(device))
        pooled.append(features[0].cpu())
        logits.append(features[1].cpu())
    return {
        "pooled": torch.cat(pooled),
        "logits": torch.cat(logits),
        "size": f"{images.shape[3]}x{images.shape[2]}",
        "sha256": digest.hexdigest(),
    }


def extract_all(net: Extractor, source: Source, **options: Any) -> dict[str, Any]:
    """What `extract` gives, and the features of sFID (Nash et al. 2021, arXiv:2103.03841) as
    `spatial` (N, H * W * 7): the first seven channels of a middle layer's maps, place by place. Of
    cifar-resnet those of the image, not of its mirror image, which it looks at second."""
    spatial = []

    def extract_batch(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        maps = []
        layer = {net.spatial_layer: lambda _layer, _inputs, output: maps.append(output)}
        with watching(net, layer):
            features = net(images)
        spatial.append(maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu())
        return features

    return extract(extract_batch, source, **options) | {"spatial": torch.cat(spatial)}


def extract_once(
    folder: Path | str, net: Extractor, source: Source, *, device: Device = "cpu", **options: Any
) -> dict[str, Any]:
    """What `extract_all` gives of images that many runs are scored against, kept in `folder` as
    features-KEY.safetensors; nothing is kept with "". The key is a hash of the extractor, of the
    kind of device, and of a tensor's bytes or the files' names, sizes and times of change."""
    if not folder:
        return extract_all(net, source, device=device, **options)
    made_by = f"{net.name} {sha256(net.weights)} {torch.device(device).type}\n"
    key = hashlib.sha256(made_by.encode())
    if torch.is_tensor(source):
        key.update(source.contiguous().numpy())
    else:
        for file in source:
            stat = file.stat()
            key.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    path = Path(folder) / f"features-{key.hexdigest()[:16]}.safetensors"
    with alone(path.parent):  # others wait, and read what the first one wrote
        if not path.exists():
            found = extract_all(net, source, device=device, **options)
            tensors = {kind: found[kind] for kind in ("pooled", "logits", "spatial")}
            save_tensors(path, tensors, {kind: found[kind] for kind in ("size", "sha256")})
    tensors, metadata = load_tensors(path)
    return tensors | metadata

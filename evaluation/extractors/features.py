"""Feature extractors of the distribution scores, both behind torch-fidelity's interface: uint8
images in, features out.

inception       torch-fidelity's port of the 2015-12-05 TensorFlow graph, the extractor of every published FID
cifar-resnet    the classifier in models/weights: needs no download; its scores compare only with each other
"""

import hashlib
from pathlib import Path

import torch

from base.files import alone, load_tensors, save_tensors
from base.hooks import watching
from evaluation.extractors.cifar_resnet import sha256
from models.data import read_image

# layers with maps of 17x17 and 8x8
SPATIAL = {"inception": "Mixed_6d.branch1x1", "cifar-resnet": "net.stages.1"}
SPATIAL_CHANNELS = 7


def image_batches(source, batch_size):
    """uint8 batches (N, 3, H, W) from such a tensor or from image files, which must all have one
    size."""
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
def extract(net, source, *, batch_size=256, device="cpu"):
    """Features of image files or of a uint8 tensor -> {pooled (N, D), logits (N, C), size "WxH",
    sha256 of pixels}."""
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


def extract_all(net, name, source, **how):
    """extract, and the features of sFID (Nash et al. 2021, arXiv:2103.03841) as `spatial` (N, H * W
    * 7): the first seven channels of a middle layer's maps, place by place. Of cifar-resnet those
    of the image, not of its mirror image, which it looks at second."""
    spatial = []

    def seen(images):
        maps = []
        with watching(net, {SPATIAL[name]: lambda _, inputs, output: maps.append(output)}):
            features = net(images)
        spatial.append(maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu())
        return features

    return extract(seen, source, **how) | {"spatial": torch.cat(spatial)}


def extract_once(folder, net, name, weights_path, source, *, device="cpu", **how):
    """extract_all of images that many runs are scored against, kept in `folder` as
    features-KEY.safetensors. The key is a hash of the extractor, of the kind of device, and of a
    tensor's bytes or the files' names, sizes and times of change. Without a folder nothing is
    kept."""
    if not folder:
        return extract_all(net, name, source, device=device, **how)
    key = hashlib.sha256(f"{name} {sha256(weights_path)} {torch.device(device).type}\n".encode())
    if torch.is_tensor(source):
        key.update(source.contiguous().numpy())
    else:
        for file in source:
            facts = file.stat()
            key.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    path = Path(folder) / f"features-{key.hexdigest()[:16]}.safetensors"
    # others wait, and read what the first one wrote
    with alone(path.parent):
        if not path.exists():
            found = extract_all(net, name, source, device=device, **how)
            tensors = {kind: value for kind, value in found.items() if torch.is_tensor(value)}
            save_tensors(
                path, tensors, {kind: value for kind, value in found.items() if kind not in tensors}
            )
    tensors, facts = load_tensors(path)
    return tensors | facts

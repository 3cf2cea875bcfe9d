"""Feature extractors of the distribution scores, both behind torch-fidelity's interface: uint8 images in, features out.

inception       torch-fidelity's port of the 2015-12-05 TensorFlow graph, the extractor of every published FID
cifar-resnet    the classifier in models/weights: needs no download; its scores compare only with each other
"""
import hashlib
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor

from evaluation.classifier import build_classifier
from models.data import read_image
from quant.files import alone, load_tensors, save_tensors

WEIGHTS = Path(__file__).resolve().parents[1] / "models" / "weights" / "cifar10-classifier.safetensors"
INCEPTION_SHA256 = "6726825d"               # first digits, as in the name of the file
INCEPTION_NAMES = (URL_INCEPTION_V3.rsplit("/", 1)[1], "pt_inception-2015-12-05-6726825d.pth")   # the same bytes
SPATIAL = {"inception": "Mixed_6d.branch1x1", "cifar-resnet": "net.stages.1"}    # layers with maps of 17x17 and 8x8
SPATIAL_CHANNELS = 7
OFFLINE = ("scores use the offline extractor cifar-resnet and do not compare with published FID: "
           "no Inception weights {where}; give evaluation.inception_path=FILE ({name})")


def load_classifier(path=WEIGHTS):
    """The classifier in a file of evaluation.reference: its metadata says how to build the network."""
    weights, facts = load_tensors(path)
    if "network" not in facts:
        raise ValueError(f"{path} is not a packaged classifier; restore it from the repository or make it with "
                         "python -m evaluation.reference")
    net = build_classifier(**facts["network"])
    net.load_state_dict(weights)
    return net.eval()


class CifarResnet(FeatureExtractorBase):
    """`pooled` (N, 136) and `logits` (N, 10) of the CIFAR-10 classifier, for uint8 images (N, 3, 32, 32)."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None, **_):
        super().__init__(name, features_list)
        self.net = load_classifier(feature_extractor_weights_path or WEIGHTS)

    @staticmethod
    def get_provided_features_list():
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pooled"

    @staticmethod
    def can_be_compiled():
        return True

    @staticmethod
    def get_dummy_input_for_compile():
        return torch.zeros(1, 3, 32, 32, dtype=torch.uint8)

    def forward(self, x):
        if x.shape[1:] != (3, 32, 32):
            raise ValueError(f"images are {x.shape[-1]}x{x.shape[-2]} but the extractor cifar-resnet takes 32x32; "
                             "give evaluation.inception_path=FILE for other sizes")
        pooled = self.net.features(x.float() / 255)
        features = {"pooled": pooled, "logits": self.net.head(pooled)}
        return tuple(features[name] for name in self.features_list)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def find_inception(path="", *, fetch=False):
    """-> file of the Inception weights or None, and where it was looked for.

    `path` names the file; without it torch hub's cache is searched, and with `fetch` the file is downloaded into it.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    files = [Path(path)] if path else [cache / name for name in INCEPTION_NAMES]
    found = next((file for file in files if file.is_file()), None)
    if path and not found:
        raise ValueError(f"inception_path {path} does not exist; give the file {INCEPTION_NAMES[0]}")
    if found and not sha256(found).startswith(INCEPTION_SHA256):
        raise ValueError(f"{found} is not the Inception file of 2015-12-05: its SHA-256 should begin with "
                         f"{INCEPTION_SHA256}; fetch it again from {URL_INCEPTION_V3}")
    if found or not fetch:
        return found, "in torch hub's cache"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(files[0]), INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        return None, f"in torch hub's cache, and the download failed ({error})"
    return files[0], "downloaded"


def choose_extractor(extractor="auto", inception_path="", *, fetch=False):
    """-> (name, weights file, sentence to tell the user or ""). `auto` takes Inception where its weights are found."""
    if extractor not in ("auto", *EXTRACTORS):
        raise ValueError(f"extractor '{extractor}' is unknown; choose auto, {' or '.join(EXTRACTORS)}")
    if extractor == "cifar-resnet":
        return extractor, WEIGHTS, ""
    found, where = find_inception(inception_path, fetch=fetch)
    if found:
        return "inception", found, ""
    if extractor == "inception":
        raise ValueError(f"no Inception weights {where}; give evaluation.inception_path=FILE ({INCEPTION_NAMES[0]}) "
                         "or evaluation.extractor=cifar-resnet")
    return "cifar-resnet", WEIGHTS, OFFLINE.format(where=where, name=INCEPTION_NAMES[0])


def build_extractor(name, weights_path, device="cpu"):
    """The extractor `name`, returning (pooled, logits)."""
    cls, layers = EXTRACTORS[name]
    return cls(name, list(layers), feature_extractor_weights_path=str(weights_path)).to(device).eval()


def image_batches(source, batch_size):
    """uint8 batches (N, 3, H, W) from such a tensor or from image files, which must all have one size."""
    size = None
    for start in range(0, len(source), batch_size):
        part = source[start:start + batch_size]
        if torch.is_tensor(part):
            yield part
            continue
        images = [read_image(path) for path in part]
        size = size or images[0].shape
        for path, image in zip(part, images):
            if image.shape != size:
                raise ValueError(f"{path} is {image.shape[2]}x{image.shape[1]} but {source[0].name} is "
                                 f"{size[2]}x{size[1]}; images scored together must have one size")
        yield torch.stack(images)


@torch.no_grad()
def extract(net, source, *, batch_size=256, device="cpu"):
    """Features of image files or of a uint8 tensor -> {pooled (N, D), logits (N, C), size "WxH", sha256 of pixels}."""
    pooled, logits, digest = [], [], hashlib.sha256()
    for images in image_batches(source, batch_size):
        digest.update(images.numpy().tobytes())
        features = net(images.to(device))
        pooled.append(features[0].cpu())
        logits.append(features[1].cpu())
    return {"pooled": torch.cat(pooled), "logits": torch.cat(logits), "size": f"{images.shape[3]}x{images.shape[2]}",
            "sha256": digest.hexdigest()}


def extract_all(net, name, source, **how):
    """extract, and the features of sFID (Nash et al. 2021, arXiv:2103.03841) as `spatial` (N, H * W * 7): the first
    seven channels of a middle layer's maps, place by place. Of cifar-resnet those of the image, not of its mirror
    image, which it looks at second."""
    spatial, layer = [], net.get_submodule(SPATIAL[name])

    def seen(images):
        maps = []
        hook = layer.register_forward_hook(lambda _layer, _inputs, output: maps.append(output))
        try:
            features = net(images)
        finally:
            hook.remove()
        spatial.append(maps[0][:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).cpu())
        return features
    return extract(seen, source, **how) | {"spatial": torch.cat(spatial)}


def extract_once(folder, net, name, weights_path, source, *, device="cpu", **how):
    """extract_all of images that many runs are scored against, kept in `folder` as features-KEY.safetensors. The key is
    a hash of the extractor, of the kind of device, and of a tensor's bytes or the files' names, sizes and times of
    change. Without a folder nothing is kept."""
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
    with alone(path.parent):                               # others wait, and read what the first one wrote
        if not path.exists():
            found = extract_all(net, name, source, device=device, **how)
            tensors = {kind: value for kind, value in found.items() if torch.is_tensor(value)}
            save_tensors(path, tensors, {kind: value for kind, value in found.items() if kind not in tensors})
    tensors, facts = load_tensors(path)
    return tensors | facts


EXTRACTORS = {"inception": (FeatureExtractorInceptionV3, ("2048", "logits_unbiased")),
              "cifar-resnet": (CifarResnet, ("pooled", "logits"))}
register_feature_extractor("cifar-resnet", CifarResnet)

"""The offline extractor: the CIFAR-10 classifier that ships with the project."""

from pathlib import Path

import torch

from base.files import PROJECT, load_tensors
from evaluation.extractors.classifier import Classifier, build_classifier
from evaluation.extractors.extractor import Extractor
from evaluation.references.frechet import STATISTICS

WEIGHTS = PROJECT / "models/weights/cifar10-classifier.safetensors"


def load_classifier(path: Path | str = WEIGHTS) -> Classifier:
    """Read the classifier from a packaged file, whose metadata says how to build the network."""
    weights, metadata = load_tensors(path)
    if "network" not in metadata:
        raise ValueError(
            f"{path} is not a packaged classifier; restore it from the repository or make it with "
            "python scripts/package_classifier.py"
        )
    net = build_classifier(**metadata["network"])
    net.load_state_dict(weights)
    return net.eval()


class CifarResnet(Extractor):
    """Pooled features (N, 136) and logits (N, 10) of the CIFAR-10 classifier, for uint8 images
    (N, 3, 32, 32). Needs no download; its scores compare only with each other."""

    name = "cifar-resnet"
    spatial_layer = "net.stages.1"  # maps of 8x8
    image_size = 32
    statistics = STATISTICS

    def __init__(self, weights: Path | str = WEIGHTS):
        super().__init__(weights)
        self.net = load_classifier(weights)

    @classmethod
    def find_weights(cls, path: str = "", *, fetch: bool = False) -> tuple[Path | None, str]:
        return WEIGHTS, "in the repository"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if x.shape[1:] != (3, 32, 32):
            raise ValueError(
                f"images are {x.shape[-1]}x{x.shape[-2]} but the extractor cifar-resnet takes "
                "32x32; give evaluation.inception_path=FILE for other sizes"
            )
        pooled = self.net.features(x.float() / 255)
        return pooled, self.net.head(pooled)

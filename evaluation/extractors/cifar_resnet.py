"""The offline extractor: the CIFAR-10 classifier that ships with the project, behind
torch-fidelity's interface."""

import hashlib
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import register_feature_extractor

from base.files import PROJECT, load_tensors
from evaluation.extractors.classifier import build_classifier

WEIGHTS = PROJECT / "models/weights/cifar10-classifier.safetensors"


def load_classifier(path=WEIGHTS):
    """The classifier in a file of tinydm/training/package_classifier.py: its metadata says how to
    build the network."""
    weights, facts = load_tensors(path)
    if "network" not in facts:
        raise ValueError(
            f"{path} is not a packaged classifier; restore it from the repository or make it with "
            "python scripts/package_classifier.py"
        )
    net = build_classifier(**facts["network"])
    net.load_state_dict(weights)
    return net.eval()


class CifarResnet(FeatureExtractorBase):
    """`pooled` (N, 136) and `logits` (N, 10) of the CIFAR-10 classifier, for uint8 images (N, 3,
    32, 32)."""

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
            raise ValueError(
                f"images are {x.shape[-1]}x{x.shape[-2]} but the extractor cifar-resnet takes "
                "32x32; "
                "give evaluation.inception_path=FILE for other sizes"
            )
        pooled = self.net.features(x.float() / 255)
        features = {"pooled": pooled, "logits": self.net.head(pooled)}
        return tuple(features[name] for name in self.features_list)


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


register_feature_extractor("cifar-resnet", CifarResnet)

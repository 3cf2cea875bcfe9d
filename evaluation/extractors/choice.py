"""Extractors by name, and the choice between them."""

from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.extractors.cifar_resnet import WEIGHTS, CifarResnet
from evaluation.extractors.inception import INCEPTION_NAMES, OFFLINE, find_inception


def choose_extractor(extractor="auto", inception_path="", *, fetch=False):
    """-> (name, weights file, sentence to tell the user or ""). `auto` takes Inception where its
    weights are found."""
    if extractor not in ("auto", *EXTRACTORS):
        raise ValueError(
            f"extractor '{extractor}' is unknown; choose auto, {' or '.join(EXTRACTORS)}"
        )
    if extractor == "cifar-resnet":
        return extractor, WEIGHTS, ""
    found, where = find_inception(inception_path, fetch=fetch)
    if found:
        return "inception", found, ""
    if extractor == "inception":
        raise ValueError(
            f"no Inception weights {where}; give evaluation.inception_path=FILE "
            f"({INCEPTION_NAMES[0]}) "
            "or evaluation.extractor=cifar-resnet"
        )
    return "cifar-resnet", WEIGHTS, OFFLINE.format(where=where, name=INCEPTION_NAMES[0])


def build_extractor(name, weights_path, device="cpu"):
    """The extractor `name`, returning (pooled, logits)."""
    cls, layers = EXTRACTORS[name]
    return (
        cls(name, list(layers), feature_extractor_weights_path=str(weights_path)).to(device).eval()
    )


EXTRACTORS = {
    "inception": (FeatureExtractorInceptionV3, ("2048", "logits_unbiased")),
    "cifar-resnet": (CifarResnet, ("pooled", "logits")),
}

"""Extractors by name, and the choice between them."""

from pathlib import Path

from base.devices import Device
from evaluation.extractors.cifar_resnet import CifarResnet
from evaluation.extractors.extractor import Extractor
from evaluation.extractors.inception import INCEPTION_NAMES, Inception

EXTRACTORS: dict[str, type[Extractor]] = {cls.name: cls for cls in (Inception, CifarResnet)}
OFFLINE = (
    "scores use the offline extractor cifar-resnet and do not compare with published FID: "
    "no Inception weights {where}; give evaluation.inception_path=FILE ({name})"
)


def choose_extractor(
    extractor: str = "auto", inception_path: str = "", *, fetch: bool = False
) -> tuple[str, Path, str]:
    """Choose an extractor by its name -> (name, weights file, sentence to tell the user or "").
    `auto` takes Inception where its weights are found, else cifar-resnet."""
    if extractor not in ("auto", *EXTRACTORS):
        known = " or ".join(EXTRACTORS)
        raise ValueError(f"extractor '{extractor}' is unknown; choose auto, {known}")
    name = Inception.name if extractor == "auto" else extractor
    found, where = EXTRACTORS[name].find_weights(inception_path, fetch=fetch)
    if found:
        return name, found, ""
    if extractor != "auto":
        raise ValueError(
            f"no {name.capitalize()} weights {where}; give evaluation.inception_path=FILE "
            f"({INCEPTION_NAMES[0]}) or evaluation.extractor=cifar-resnet"
        )
    weights, _ = CifarResnet.find_weights()
    return CifarResnet.name, weights, OFFLINE.format(where=where, name=INCEPTION_NAMES[0])


def build_extractor(name: str, weights: Path | str, device: Device = "cpu") -> Extractor:
    """The extractor `name` with its weights, ready to run on `device`."""
    return EXTRACTORS[name](weights).to(device).eval()

"""Inception: where its weights are found, what is refused, and the names of its scores."""

import os
from urllib.error import URLError

import pytest
import torch
from PIL import Image
from torch_fidelity import feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from base.files import sha256
from evaluation.extractors import inception
from evaluation.extractors.choice import build_extractor, choose_extractor
from evaluation.extractors.inception import INCEPTION_NAMES, Inception
from evaluation.references import images as references
from evaluation.scores import distribution
from evaluation.scores.distribution import distribution_scores


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_inception_by_path_and_in_the_cache(hub, monkeypatch):
    path = hub / INCEPTION_NAMES[1]
    path.write_bytes(b"not the weights")
    with pytest.raises(ValueError, match="not the Inception file of 2015-12-05"):
        Inception.find_weights()
    with pytest.raises(ValueError, match="nothing.pth does not exist"):
        Inception.find_weights("nothing.pth")
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(path)[:8])
    assert choose_extractor() == ("inception", path, "")
    assert Inception.find_weights(str(path))[0] == path


def test_a_failed_download_is_part_of_the_notice(hub, monkeypatch):
    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    assert "the download failed" in choose_extractor(fetch=True)[2]


class Payload:
    """As a pickle, it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_weights_file_that_runs_code_is_refused(hub, tmp_path, monkeypatch):
    """Even one that begins with the right digits of the SHA-256, which can be tried for."""
    path = hub / INCEPTION_NAMES[0]
    torch.save({"fc.weight": Payload(tmp_path / "it ran")}, path)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(path)[:8])
    name, weights, _ = choose_extractor()
    with pytest.raises(ValueError, match="does not hold tensors alone"):
        build_extractor(name, weights)
    assert not (tmp_path / "it ran").exists()


def test_inception_scores_carry_the_published_names(tmp_path, monkeypatch):
    """Random weights and a small input stand in for the real file."""
    with monkeypatch.context() as patch:
        patch.setattr(
            feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(
            FeatureExtractorInceptionV3("inception", ["2048"]).state_dict(),
            tmp_path / "inception.pth",
        )
    monkeypatch.setattr(FeatureExtractorInceptionV3, "INPUT_IMAGE_SIZE", 75)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", "")
    monkeypatch.setattr(distribution, "MIN_IMAGES", 10)
    monkeypatch.setattr(references, "MIN_IMAGES", 10)
    small = tmp_path / "small"
    small.mkdir()
    for i in range(12):
        image = torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy()
        Image.fromarray(image).save(small / f"{i}.png")
    alone = distribution_scores(small, inception_path=str(tmp_path / "inception.pth"))
    assert (
        set(alone["scores"]) == {"IS", "IS-std"}
        and "reference=cifar10-train" in alone["protocol"]["left_out"]["FD"]
    )
    assert (
        "KID, precision, recall" in alone["protocol"]["left_out"]
        and alone["protocol"]["neighbours_among"] is None
    )
    # the shipped ones must not be touched
    monkeypatch.setattr(references, "read_statistics", None)
    found = distribution_scores(
        small, inception_path=str(tmp_path / "inception.pth"), reference=str(small)
    )
    assert set(found["scores"]) == {"IS", "IS-std", "KID", "KID-std", "precision", "recall"}
    assert (
        "2048 features" in found["protocol"]["left_out"]["FD"]
        and found["protocol"]["extractor"] == "inception"
    )
    # 17 x 17 x 7 at the real input size
    assert f"{3 * 3 * 7} features" in found["protocol"]["left_out"]["sFD"]
    assert Inception.score_name("sFD") == "sFID"

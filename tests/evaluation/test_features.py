"""Choice of the extractor, never silent, and features that do not depend on how images are
batched."""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.extractors import features
from evaluation.extractors.choice import build_extractor, choose_extractor
from evaluation.extractors.cifar_resnet import WEIGHTS, load_classifier
from evaluation.extractors.classifier import MEAN, STD
from evaluation.extractors.features import extract, extract_all, extract_once


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of torch hub."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_equal_to_the_classifier():
    x = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    pooled, logits = build_extractor("cifar-resnet", WEIGHTS)(x)
    net = load_classifier()
    with torch.no_grad():
        torch.testing.assert_close(pooled, net.features(x / 255))
        torch.testing.assert_close(logits, net.logits(x / 255))


def test_extract_from_files_equals_extract_from_a_tensor(tmp_path):
    images = torch.randint(0, 256, (7, 3, 32, 32), dtype=torch.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    net = build_extractor("cifar-resnet", WEIGHTS)
    whole = extract(net, images, batch_size=7)
    files = extract(net, sorted(tmp_path.glob("*.png")), batch_size=3)
    torch.testing.assert_close(files["pooled"], whole["pooled"])
    assert files["sha256"] == whole["sha256"] and files["size"] == "32x32"


def test_spatial_features_are_seven_channels_of_a_middle_layer():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    net = load_classifier()
    found = extract_all(build_extractor("cifar-resnet", WEIGHTS), images, batch_size=2)
    with torch.no_grad():
        maps = net.stages[1](net.stages[0](net.stem((images / 255 - MEAN) / STD)))
        torch.testing.assert_close(found["pooled"], net.features(images / 255))
    assert found["spatial"].shape == (5, 8 * 8 * 7)
    torch.testing.assert_close(found["spatial"].reshape(5, 8, 8, 7)[:, 2, 6, 4], maps[:, 4, 2, 6])


@pytest.mark.parametrize("as_files", [True, False])
def test_what_is_kept_is_extracted_once_for_the_same_images(tmp_path, monkeypatch, as_files):
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    source = sorted(tmp_path.glob("*.png")) if as_files else images
    net = build_extractor("cifar-resnet", WEIGHTS)
    wanted, calls = extract_all(net, source), []
    monkeypatch.setattr(
        features, "extract_all", lambda *a, **k: calls.append(1) or extract_all(*a, **k)
    )
    for _ in range(2):
        found = extract_once(tmp_path / "kept", net, source)
        assert found.keys() == wanted.keys() and len(calls) == 1
        assert all(torch.equal(found[key], wanted[key]) for key in ("pooled", "logits", "spatial"))
        assert (found["size"], found["sha256"]) == (wanted["size"], wanted["sha256"])
    extract_once(tmp_path / "kept", net, source[:4])  # others
    if as_files:
        # the same name, another image
        Image.new("RGB", (32, 32)).save(source[0])
        assert extract_once(tmp_path / "kept", net, source)["sha256"] != wanted["sha256"]
    extract_once("", net, source)  # not kept
    assert len(calls) == 3 + as_files and len(list((tmp_path / "kept").iterdir())) == 2 + as_files


def test_runs_that_score_at_once_extract_once(tmp_path, monkeypatch):
    images, calls = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8), []

    def slow(*arguments, **how):
        calls.append(1)
        time.sleep(0.3)
        return extract_all(*arguments, **how)

    monkeypatch.setattr(features, "extract_all", slow)
    net = build_extractor("cifar-resnet", WEIGHTS)
    with ThreadPoolExecutor(2) as pool:
        a, b = pool.map(lambda _: extract_once(tmp_path, net, images), range(2))
    assert len(calls) == 1 and torch.equal(a["pooled"], b["pooled"])


def test_other_and_mixed_sizes_are_refused(tmp_path):
    net = build_extractor("cifar-resnet", WEIGHTS)
    with pytest.raises(ValueError, match="64x48 but the extractor cifar-resnet takes 32x32"):
        net(torch.zeros(1, 3, 48, 64, dtype=torch.uint8))
    for i, size in enumerate((32, 16)):
        Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="1.png is 16x16 but 0.png is 32x32"):
        extract(net, sorted(tmp_path.glob("*.png")))


def test_without_inception_the_offline_extractor_is_announced(hub):
    name, weights_path, notice = choose_extractor()
    assert (name, weights_path) == ("cifar-resnet", WEIGHTS)
    assert "offline extractor" in notice and "do not compare with published FID" in notice
    assert choose_extractor("cifar-resnet") == ("cifar-resnet", WEIGHTS, "")
    with pytest.raises(ValueError, match="no Inception weights"):
        choose_extractor("inception")
    with pytest.raises(
        ValueError, match="extractor 'vgg' is unknown; choose auto, inception or cifar-resnet"
    ):
        choose_extractor("vgg")

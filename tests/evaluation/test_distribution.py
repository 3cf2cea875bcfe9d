"""Scores of a distribution with answers known beforehand, agreement with torch-fidelity, and one
sentence for every bad folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from evaluation.extractors import features
from evaluation.extractors.cifar_resnet import WEIGHTS, CifarResnet
from evaluation.extractors.features import extract_all
from evaluation.references.frechet import (
    STATISTICS,
    frechet_distance,
    read_statistics,
    statistics_of,
)
from evaluation.scores import distribution
from evaluation.scores.distribution import distribution_scores
from evaluation.scores.frechet import distance_to_float
from evaluation.scores.score import Score

# scores that need the features of a reference
NEIGHBOURS = ("precision", "recall", "KID", "KID-std")


def write_images(folder, num, seed=0, size=32):
    """Smooth coloured noise, so that images differ in features and not only in pixels."""
    rng = np.random.default_rng(seed)
    folder.mkdir()
    for i in range(num):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((size, size), Image.BICUBIC).save(folder / f"{i:06d}.png")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "a", 200), write_images(root / "b", 220, seed=1)


def test_images_of_other_sizes_have_no_scores_of_a_distribution_without_inception(
    tmp_path, monkeypatch
):
    folder = tmp_path / "large"
    folder.mkdir()
    for i in range(100):
        Image.new("RGB", (48, 40), (i, 2 * i, 7)).save(folder / f"{i:06d}.png")
    choice = "cifar-resnet", WEIGHTS, "offline"
    monkeypatch.setattr(distribution, "choose_extractor", lambda *_, **__: choice)
    found = distribution_scores(folder)
    assert found["scores"] == {} and found["protocol"]["image_size"] == "48x40"
    assert (
        "these are 48x40; fetch the weights with evaluation.fetch=true"
        in found["protocol"]["left_out"]
    )
    assert found["protocol"]["notice"] == "offline" and distance_to_float(found, found) == {}
    with pytest.raises(ValueError, match="takes 32x32; give evaluation.inception_path=FILE"):
        distribution_scores(folder, extractor="cifar-resnet")


def test_equal_folders(folders):
    found = distribution_scores(folders[0], extractor="cifar-resnet", reference=str(folders[0]))
    scores = found["scores"]
    assert scores["FD-cifar-resnet"] == pytest.approx(0, abs=1e-4)
    assert scores["precision-cifar-resnet"] == scores["recall-cifar-resnet"] == 1
    assert scores["KID-cifar-resnet"] <= 0 and found["protocol"]["kid_subset_size"] == 200
    assert found["protocol"]["samples_sha256"] == found["protocol"]["reference_sha256"]


def test_scores_from_kept_features_are_the_same(folders, tmp_path):
    def scores(**kept):
        return distribution_scores(
            folders[0], extractor="cifar-resnet", reference=str(folders[1]), **kept
        )["scores"]

    wanted = scores()
    assert all(scores(kept=tmp_path, keep_samples=both) == wanted for both in (False, True, True))
    assert len(list(tmp_path.glob("features-*.safetensors"))) == 2


def test_the_distance_to_float_is_that_to_its_images_as_a_reference(folders):
    quantized, full = (distribution_scores(folder, extractor="cifar-resnet") for folder in folders)
    wanted = distribution_scores(folders[0], extractor="cifar-resnet", reference=str(folders[1]))[
        "scores"
    ]
    assert distance_to_float(quantized, full) == {
        "FD-cifar-resnet to FP32": pytest.approx(wanted["FD-cifar-resnet"], rel=1e-9)
    }
    assert distance_to_float(full, full)["FD-cifar-resnet to FP32"] == pytest.approx(0, abs=1e-4)
    assert distance_to_float(
        {"scores": {"FID": 3.0}, "features": full["features"]}, full
    ).keys() == {"FID to FP32"}
    assert distance_to_float({"scores": {}}, {"scores": {}}) == {}


class ForTorchFidelity(FeatureExtractorBase):
    """The extractor cifar-resnet behind torch-fidelity's interface."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)
        self.net = CifarResnet()

    @staticmethod
    def get_provided_features_list():
        return "pooled", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "logits" if metric == "isc" else "pooled"

    def forward(self, x):
        found = dict(zip(self.get_provided_features_list(), self.net(x)))
        return tuple(found[name] for name in self.features_list)


def test_agreement_with_torch_fidelity(folders):
    scores = distribution_scores(folders[0], extractor="cifar-resnet", reference=str(folders[1]))[
        "scores"
    ]
    register_feature_extractor("cifar-resnet", ForTorchFidelity)
    upstream = calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        feature_extractor="cifar-resnet",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=200,
        cuda=False,
        verbose=False,
        save_cpu_ram=True,
    )
    names = {
        "IS": "inception_score_mean",
        "IS-std": "inception_score_std",
        "FD": "frechet_inception_distance",
        "KID": "kernel_inception_distance_mean",
        "KID-std": "kernel_inception_distance_std",
        "precision": "precision",
        "recall": "recall",
    }
    for score, key in names.items():
        ours = scores[CifarResnet.score_name(score)]
        assert ours == pytest.approx(upstream[key], rel=1e-3, abs=1e-6), score


def test_without_a_reference_the_shipped_statistics_serve(folders):
    found = distribution_scores(folders[0], extractor="cifar-resnet")
    assert set(found["scores"]) == {
        CifarResnet.score_name(word) for word in ("FD", "IS", "IS-std", *NEIGHBOURS)
    }
    protocol = found["protocol"]
    assert protocol["count"] == 200 and protocol["reference_count"] == 50000
    assert protocol["reference"].startswith(STATISTICS.name) and protocol["image_format"] == "png"
    assert protocol["tool"].startswith("torch-fidelity ") and protocol["neighbours_among"] == 10_000
    assert (
        "200 images cannot give a covariance of 448 features full rank"
        in protocol["left_out"]["sFD"]
    )


def test_of_a_larger_folder_the_first_images_count(folders, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    for path in sorted(folders[0].iterdir())[:150]:
        (first / path.name).symlink_to(path)
    found, alone = (
        distribution_scores(a, extractor="cifar-resnet", count=150) for a in (folders[0], first)
    )
    assert found.pop("features").equal(alone.pop("features"))
    assert found == alone and found["protocol"]["count"] == 150


def test_more_images_than_spatial_features_get_both_distances(tmp_path):
    """In the field's order, and each from its own features and statistics."""
    folder = write_images(tmp_path / "many", 449)
    scores = distribution_scores(folder, extractor="cifar-resnet")["scores"]
    assert list(scores) == [
        CifarResnet.score_name(word) for word in ("FD", "sFD", "IS", "IS-std", *NEIGHBOURS)
    ]
    ours = statistics_of(extract_all(CifarResnet(), sorted(folder.iterdir())))
    real, *_ = read_statistics()
    for name, kind in (("FD", "pooled"), ("sFD", "spatial")):
        assert scores[f"{name}-cifar-resnet"] == pytest.approx(
            frechet_distance(ours[kind], real[kind])
        )


def test_spatial_distance_sees_the_layout(tmp_path, monkeypatch):
    """Images and the same turned upside down: the places differ. Equal sets are 0 apart."""
    # 64 features, for which 100 images will do
    monkeypatch.setattr(features, "SPATIAL_CHANNELS", 1)
    a, b = write_images(tmp_path / "a", 100), tmp_path / "b"
    b.mkdir()
    for path in a.iterdir():
        Image.open(path).transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(b / path.name)
    same, turned = (
        distribution_scores(a, extractor="cifar-resnet", reference=str(real))["scores"]
        for real in (a, b)
    )
    assert same["sFD-cifar-resnet"] == pytest.approx(0, abs=1e-3)
    assert turned["sFD-cifar-resnet"] > 100 * abs(same["sFD-cifar-resnet"])


def test_too_few_images_for_a_covariance_leave_the_distance_out(tmp_path):
    found = distribution_scores(write_images(tmp_path / "few", 120), extractor="cifar-resnet")
    assert set(found["scores"]) == {
        CifarResnet.score_name(word) for word in ("IS", "IS-std", *NEIGHBOURS)
    }
    assert (
        "120 images cannot give a covariance of 136 features full rank"
        in found["protocol"]["left_out"]["FD"]
    )


def test_the_offline_extractor_is_announced_in_the_protocol_and_nothing_is_printed(
    folders, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    protocol = distribution_scores(folders[0])["protocol"]
    assert protocol["extractor"] == "cifar-resnet"
    assert protocol["notice"].startswith("scores use the offline extractor cifar-resnet")
    assert capsys.readouterr().out == ""


def test_a_new_score_is_one_function_more(folders, monkeypatch):
    """It sees the features of both sets and may leave a number out."""

    def spread(samples, reference):
        assert samples["pooled"].shape == (200, 136) and reference.pooled.shape == (220, 136)
        return Score({"spread": 1.5}, {"other": "no wish"}, {"spread_power": 2})

    monkeypatch.setattr(distribution, "SCORES", (spread,))
    found = distribution_scores(folders[0], extractor="cifar-resnet", reference=str(folders[1]))
    assert found["scores"] == {"spread-cifar-resnet": 1.5}
    assert found["protocol"]["left_out"] == {"other": "no wish"}
    assert found["protocol"]["spread_power"] == 2


def test_bad_folders_are_said_in_a_sentence(folders, tmp_path):
    def complain(words, samples, **options):
        with pytest.raises(ValueError, match=words):
            distribution_scores(samples, extractor="cifar-resnet", **options)

    (tmp_path / "empty").mkdir()
    complain("does not exist", tmp_path / "nowhere")
    complain("holds no images", tmp_path / "empty")
    complain(
        "holds 3 images but scores of a distribution need at least 100",
        write_images(tmp_path / "three", 3),
    )
    complain("reference .*three holds 3 images", folders[0], reference=str(tmp_path / "three"))
    broken = write_images(tmp_path / "broken", 100)
    (broken / "000050.png").write_bytes(b"no image")
    complain("000050.png is not a readable image", broken)
    mixed = write_images(tmp_path / "mixed", 100)
    Image.new("RGB", (16, 16)).save(mixed / "000099.png")
    complain("000099.png is 16x16 but 000000.png is 32x32", mixed)

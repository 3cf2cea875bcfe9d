"""Scores with answers known beforehand, agreement with torch-fidelity, and one sentence for every
bad folder."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics, feature_extractor_inceptionv3
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluation.extractors import features
from evaluation.extractors.choice import build_extractor
from evaluation.extractors.cifar_resnet import load_classifier
from evaluation.extractors.classifier import MEAN, STD
from evaluation.extractors.features import extract_all
from evaluation.references.frechet import (
    STATISTICS,
    frechet_distance,
    read_statistics,
    statistics_of,
)
from evaluation.scores import distribution as metrics
from evaluation.scores.cost import bit_operations
from evaluation.scores.distribution import distance_to_float, distribution_scores
from evaluation.scores.paired import LPIPS, lpips, paired_scores, psnr_db, ssim

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
    monkeypatch.setattr(
        metrics, "choose_extractor", lambda *_, **__: ("cifar-resnet", metrics.WEIGHTS, "offline")
    )
    found = distribution_scores(folder)
    assert found["scores"] == {} and found["protocol"]["image_size"] == "48x40"
    assert (
        "these are 48x40; fetch the weights with evaluation.fetch=true"
        in found["protocol"]["left_out"]
    )
    assert metrics.distance_to_float(found, found) == {}
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


def test_agreement_with_torch_fidelity(folders):
    scores = distribution_scores(folders[0], extractor="cifar-resnet", reference=str(folders[1]))[
        "scores"
    ]
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
        ours = scores[metrics._named(score, "cifar-resnet")]
        assert ours == pytest.approx(upstream[key], rel=1e-3, abs=1e-6), score


def test_without_a_reference_the_shipped_statistics_serve(folders):
    found = distribution_scores(folders[0], extractor="cifar-resnet")
    assert set(found["scores"]) == {
        metrics._named(word, "cifar-resnet") for word in ("FD", "IS", "IS-std", *NEIGHBOURS)
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
    pairs = paired_scores(folders[0], first, count=150)
    assert (pairs["count"], pairs["unpaired"], pairs["identical"]) == (150, 0, 150)


def test_more_images_than_spatial_features_get_both_distances(tmp_path):
    """In the field's order, and each from its own features and statistics."""
    folder = write_images(tmp_path / "many", 449)
    scores = distribution_scores(folder, extractor="cifar-resnet")["scores"]
    assert list(scores) == [
        metrics._named(word, "cifar-resnet") for word in ("FD", "sFD", "IS", "IS-std", *NEIGHBOURS)
    ]
    net = build_extractor("cifar-resnet", features.WEIGHTS)
    ours, real = (
        statistics_of(extract_all(net, "cifar-resnet", sorted(folder.iterdir()))),
        read_statistics()[0],
    )
    for name, kind in (("FD", "pooled"), ("sFD", "spatial")):
        assert scores[f"{name}-cifar-resnet"] == pytest.approx(
            frechet_distance(ours[kind], real[kind])
        )


def test_spatial_features_are_seven_channels_of_a_middle_layer():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    weights, net = features.WEIGHTS, load_classifier()
    found = extract_all(
        build_extractor("cifar-resnet", weights), "cifar-resnet", images, batch_size=2
    )
    with torch.no_grad():
        maps = net.stages[1](net.stages[0](net.stem((images / 255 - MEAN) / STD)))
        torch.testing.assert_close(found["pooled"], net.features(images / 255))
    assert found["spatial"].shape == (5, 8 * 8 * 7)
    torch.testing.assert_close(found["spatial"].reshape(5, 8, 8, 7)[:, 2, 6, 4], maps[:, 4, 2, 6])


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
        metrics._named(word, "cifar-resnet") for word in ("IS", "IS-std", *NEIGHBOURS)
    }
    assert (
        "120 images cannot give a covariance of 136 features full rank"
        in found["protocol"]["left_out"]["FD"]
    )


def test_the_offline_extractor_is_announced(folders, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    protocol = distribution_scores(folders[0])["protocol"]
    assert protocol["extractor"] == "cifar-resnet" and protocol["notice"] in capsys.readouterr().out


def test_inception_scores_carry_the_published_names(folders, tmp_path, monkeypatch):
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
    monkeypatch.setattr(features, "INCEPTION_SHA256", "")
    monkeypatch.setattr(metrics, "MIN_IMAGES", 10)
    small = write_images(tmp_path / "small", 12)
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
    monkeypatch.setattr(metrics, "read_statistics", None)
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
    assert metrics._named("sFD", "inception") == "sFID"


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


def test_psnr_of_a_constant_shift():
    a = torch.full((2, 3, 16, 16), 100, dtype=torch.uint8)
    b = a.clone()
    b[1] += 5
    found = psnr_db(a, b)
    assert found[0] == math.inf and found[1].item() == pytest.approx(20 * math.log10(255 / 5))


def test_ssim_of_equal_and_of_constant_images():
    """Two constant images differ in luminance alone: (2ab + C1) / (a^2 + b^2 + C1)."""
    a = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(ssim(a, a), torch.ones(2, dtype=torch.float64))
    c1 = (0.01 * 255) ** 2
    flat = [torch.full((1, 3, 16, 16), value, dtype=torch.uint8) for value in (60, 180)]
    expected = (2 * 60 * 180 + c1) / (60**2 + 180**2 + c1)
    assert ssim(*flat).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="8x8 but SSIM's window is 11x11"):
        ssim(a[..., :8, :8], a[..., :8, :8])


def test_ssim_follows_its_formula_at_every_pixel_of_the_reflected_image():
    a, b = (
        torch.randint(
            0, 256, (1, 3, 13, 16), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        for i in (0, 1)
    )
    g = torch.exp(-torch.arange(-5, 6, dtype=torch.float64).square() / (2 * 1.5**2))
    window = torch.outer(g, g) / g.sum() ** 2
    x, y = (torch.nn.functional.pad(v.double(), (5, 5, 5, 5), mode="reflect")[0] for v in (a, b))
    c1, c2, found = (0.01 * 255) ** 2, (0.03 * 255) ** 2, []
    for channel, i, j in itertools.product(range(3), range(13), range(16)):
        u, v = (z[channel, i : i + 11, j : j + 11] for z in (x, y))
        mu, nu = (window * u).sum(), (window * v).sum()
        variances = (window * (u - mu) ** 2).sum() + (window * (v - nu) ** 2).sum()
        covariance = (window * (u - mu) * (v - nu)).sum()
        found.append(
            (2 * mu * nu + c1) * (2 * covariance + c2) / ((mu**2 + nu**2 + c1) * (variances + c2))
        )
    assert ssim(a, b).item() == pytest.approx(float(torch.stack(found).mean()), abs=1e-9)


def test_lpips_is_zero_for_equal_images_and_follows_its_formula():
    a, b = (
        torch.randint(
            0, 256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        for i in (0, 1)
    )
    net, expected = load_classifier(), torch.zeros(2)
    assert lpips(net, a, a).tolist() == [0, 0]
    with torch.no_grad():
        y, y0 = (net.stem((x / 255 - MEAN) / STD) for x in (a, b))
        for stage in (torch.nn.Identity(), *net.stages):
            y, y0 = stage(y), stage(y0)
            for i in range(2):
                unit, unit0 = (
                    v[i] / v[i].square().sum(0, keepdim=True).sqrt().clamp(min=1e-10)
                    for v in (y, y0)
                )
                expected[i] += (unit - unit0).square().sum() / unit[0].numel()
    torch.testing.assert_close(lpips(net, a, b), expected)
    less = ((a.float() + 0.1 * (b.float() - a.float())).round()).to(torch.uint8)
    assert (lpips(net, a, less) < lpips(net, a, b)).all()


def test_bit_operations_by_hand():
    """10 multiply-adds of 4 x 8 bits, 3 of 8 x 16, 2 left alone."""
    layers = [
        {"bit_product": 32, "macs": 10},
        {"bit_product": 128, "macs": 3},
        {"bit_product": 1024, "macs": 2},
    ]
    assert bit_operations(layers) == {"float": 15 * 1024, "quantized": 10 * 32 + 3 * 128 + 2 * 1024}


def test_pairs_by_name(tmp_path, monkeypatch):
    for folder, shift, num in (("a", 0, 4), ("b", 10, 3)):
        (tmp_path / folder).mkdir()
        for i in range(num):
            value = 100 + (shift if i else 0)
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / folder / f"{i}.png")
    monkeypatch.setattr(metrics, "VALUES_AT_ONCE", 2 * 3 * 16 * 16)
    found = paired_scores(tmp_path / "a", tmp_path / "b")
    assert found["psnr_db"] == pytest.approx(20 * math.log10(255 / 10)) and found["ssim"] < 1
    assert (found["count"], found["identical"], found["unpaired"]) == (3, 1, 1)
    assert found[LPIPS] is None  # its network takes 32x32
    same = paired_scores(tmp_path / "a", tmp_path / "a")
    assert same["psnr_db"] is None and same["ssim"] == pytest.approx(1) and same["identical"] == 4
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no PNG has the same name"):
        paired_scores(tmp_path / "a", tmp_path / "none")
    Image.new("RGB", (12, 12)).save(tmp_path / "b" / "2.png")
    with pytest.raises(ValueError, match="2.png is 16x16 .* 12x12"):
        paired_scores(tmp_path / "a", tmp_path / "b")

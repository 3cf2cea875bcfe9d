"""The offline extractor's network, its package and the files that ship."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from base.config import read_yaml
from base.files import load_tensors, sha256
from evaluation.extractors.cifar_resnet import WEIGHTS, load_classifier
from evaluation.extractors.classifier import build_classifier
from evaluation.references import frechet
from evaluation.references.frechet import (
    STATISTICS,
    frechet_distance,
    read_statistics,
    statistics_of,
    write_statistics,
)
from tinydm.training.package_classifier import PackageConfig, package

TINY = {"stem_width": 4, "widths": [4, 8, 6], "depth": 2}


def test_shapes_and_a_hand_computed_head():
    net = build_classifier(**TINY).eval()
    x = torch.rand(2, 3, 32, 32)
    features = net.features(x)
    assert features.shape == (2, 6) and (features >= 0).all()
    torch.testing.assert_close(net.logits(x), features @ net.head.weight.T + net.head.bias)
    # halved once in each of three stages
    assert net.stages(net.stem(x)).shape == (2, 6, 4, 4)


def test_the_recipe_builds_the_shipped_network():
    recipe = read_yaml(Path(__file__).parents[2] / "configs" / "train" / "cifar10-classifier.yaml")
    assert (
        build_classifier(**recipe.classifier).state_dict().keys()
        == load_classifier().state_dict().keys()
    )


def test_shipped_files_fit_together():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    statistics, kept, facts = read_statistics()
    assert WEIGHTS.stat().st_size < 2e6 and record["test_accuracy"] >= 0.9
    assert record["weights_sha256"] == facts["extractor_sha256"] == sha256(WEIGHTS)
    assert record["statistics_sha256"] == sha256(STATISTICS) and facts["count"] == 50000
    for kind, size in (("pooled", 136), ("spatial", 8 * 8 * 7)):
        assert statistics[kind]["mu"].shape == (size,) and statistics[kind]["sigma"].shape == (
            size,
            size,
        )
        assert np.linalg.eigvalsh(statistics[kind]["sigma"]).min() > 0
    # of every fifth image
    deviation = (kept.mean(0).numpy() - statistics["pooled"]["mu"]) / kept.std(0).numpy()
    assert kept.shape == (10_000, 136) and abs(deviation).max() < 4 / 10_000**0.5


def test_package_of_a_tiny_run(tmp_path):
    net = build_classifier(**TINY).eval()
    (tmp_path / "run").mkdir()
    save_file(
        {
            key: value.half() if value.is_floating_point() else value
            for key, value in net.state_dict().items()
        },
        tmp_path / "run" / "weights.safetensors",
    )
    recipe = {"classifier": TINY, "seed": 7, "data": "somewhere", "out": "elsewhere", "model": ""}
    (tmp_path / "run" / "record.json").write_text(json.dumps({"recipe": recipe, "final_loss": 1.5}))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(10):
                image = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / label / f"{i}.png")
    record = package(
        PackageConfig(
            run=str(tmp_path / "run"), data=str(tmp_path / "data"), out=str(tmp_path / "out")
        )
    )

    packed = load_classifier(tmp_path / "out" / "cifar10-classifier.safetensors")
    x = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(packed.logits(x), net.logits(x), atol=1e-2, rtol=1e-2)
    assert (
        record["seed"] == 7
        and record["scores"]["train"]["count"] == 20
        and "somewhere" not in json.dumps(record)
    )
    assert json.loads((tmp_path / "out" / "cifar10-classifier.json").read_text()) == record
    *_, facts = read_statistics(tmp_path / "out" / "cifar10-classifier-stats.safetensors")
    assert facts["extractor_sha256"] == sha256(tmp_path / "out" / "cifar10-classifier.safetensors")


def test_statistics_come_back_as_mean_and_covariance(tmp_path):
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
    write_statistics(
        tmp_path / "s.safetensors",
        {"pooled": features, "spatial": features[:, :1] + 3},
        {"count": 4},
    )
    statistics, kept, facts = read_statistics(tmp_path / "s.safetensors")
    np.testing.assert_allclose(statistics["pooled"]["mu"], [1, 1])
    np.testing.assert_allclose(statistics["pooled"]["sigma"], np.eye(2) * 4 / 3)
    np.testing.assert_allclose(statistics["spatial"]["mu"], [4])
    np.testing.assert_allclose(statistics["spatial"]["sigma"], [[4 / 3]])
    assert facts == {"count": 4} and all(
        value.dtype == np.float64 for part in statistics.values() for value in part.values()
    )
    assert load_tensors(tmp_path / "s.safetensors")[0].keys() == {
        "mu",
        "sigma",
        "mu_s",
        "sigma_s",
        "features",
    }
    assert torch.equal(kept, features)


def test_kept_features_are_evenly_picked(tmp_path, monkeypatch):
    monkeypatch.setattr(frechet, "KEPT", 4)
    features = torch.arange(18.0)[:, None].repeat(1, 2)
    write_statistics(
        tmp_path / "s.safetensors", {"pooled": features, "spatial": features}, {"count": 18}
    )
    assert read_statistics(tmp_path / "s.safetensors")[1][:, 0].tolist() == [0, 4, 8, 12]


def test_single_precision_of_the_covariance_does_not_move_the_distance(tmp_path):
    """Correlated features with standard deviations from 0.01 to 1, two sets that differ little."""
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(448, 448, generator=rng) * torch.logspace(-2, 0, 448)
    a, b = (
        {kind: torch.randn(2000, 448, generator=rng) @ mix for kind in ("pooled", "spatial")}
        for _ in range(2)
    )
    write_statistics(tmp_path / "s.safetensors", a, {"count": 2000})
    stored, exact, other = (
        found["spatial"]
        for found in (
            read_statistics(tmp_path / "s.safetensors")[0],
            statistics_of(a),
            statistics_of(b),
        )
    )
    assert frechet_distance(other, stored) == pytest.approx(
        frechet_distance(other, exact), rel=1e-4
    )


def test_frechet_distance_of_two_gaussians():
    """|m|^2 + sum (s1 - s2)^2 for diagonal covariances s^2 (Dowson & Landau 1982)."""
    a = {"mu": np.zeros(3), "sigma": np.diag([1.0, 4.0, 9.0])}
    b = {"mu": np.array([3.0, 4.0, 0.0]), "sigma": np.diag([4.0, 4.0, 1.0])}
    assert frechet_distance(a, b) == pytest.approx(25 + 1 + 0 + 4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_absent_and_foreign_files_are_said_in_a_sentence(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a packaged classifier"):
        load_classifier(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a file of reference statistics"):
        read_statistics(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="nothing.safetensors"):
        load_classifier(tmp_path / "nothing.safetensors")
    with pytest.raises(ValueError, match="holds no finished training"):
        package(PackageConfig(run=str(tmp_path), out=str(tmp_path)))


def test_features_are_those_of_image_and_mirror_image():
    net, x = build_classifier(**TINY).eval(), torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net.features(x), net.features(x.flip(3)))
    torch.testing.assert_close(net.features(x), (net.one_sided(x) + net.one_sided(x.flip(3))) / 2)
    net.train()
    assert not torch.allclose(net.features(x), net.features(x.flip(3)))

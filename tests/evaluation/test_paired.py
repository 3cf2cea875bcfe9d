"""Scores of pairs of images, with answers known beforehand."""

import itertools
import math

import pytest
import torch
from PIL import Image

from evaluation.extractors.cifar_resnet import load_classifier
from evaluation.extractors.classifier import MEAN, STD
from evaluation.scores import paired
from evaluation.scores.paired import LPIPS, compare_images, lpips, paired_scores, psnr_db, ssim


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


def test_pairs_by_name(tmp_path, monkeypatch):
    for folder, shift, num in (("a", 0, 4), ("b", 10, 3)):
        (tmp_path / folder).mkdir()
        for i in range(num):
            value = 100 + (shift if i else 0)
            Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / folder / f"{i}.png")
    monkeypatch.setattr(paired, "VALUES_AT_ONCE", 2 * 3 * 16 * 16)
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


def test_of_larger_folders_the_first_images_count(tmp_path):
    for folder, num in (("a", 5), ("b", 3)):
        (tmp_path / folder).mkdir()
        for i in range(num):
            Image.new("RGB", (16, 16), (i,) * 3).save(tmp_path / folder / f"{i}.png")
    found = paired_scores(tmp_path / "a", tmp_path / "b", count=3)
    assert (found["count"], found["unpaired"], found["identical"]) == (3, 0, 3)


def test_tensors_and_their_files_get_the_same_numbers(tmp_path, monkeypatch):
    """Also in batches of two; one pair of five is equal."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randint(0, 256, (2, 5, 3, 32, 32), generator=generator, dtype=torch.uint8)
    b[3] = a[3]
    for folder, images in (("a", a), ("b", b)):
        (tmp_path / folder).mkdir()
        for i, image in enumerate(images):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.save(tmp_path / folder / f"{i}.png")
    monkeypatch.setattr(paired, "VALUES_AT_ONCE", 2 * 32 * 32)
    found = compare_images(a, b)
    assert found | {"unpaired": 0} == paired_scores(tmp_path / "a", tmp_path / "b")
    others = [0, 1, 2, 4]
    assert found["psnr_db"] == pytest.approx(psnr_db(a, b)[others].mean().item())
    assert found["ssim"] == pytest.approx(ssim(a, b).mean().item())
    assert found[LPIPS] == pytest.approx(lpips(load_classifier(), a, b).mean().item(), rel=1e-5)
    assert (found["count"], found["identical"]) == (5, 1)


def test_batches_that_cannot_be_compared_are_refused():
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="differ; give two batches of the same shape"):
        compare_images(images, images[:1])
    with pytest.raises(ValueError, match="give at least one image, uint8"):
        compare_images(images[:0], images[:0])
    with pytest.raises(ValueError, match="torch.float32; give at least one image, uint8"):
        compare_images(images, images.float())

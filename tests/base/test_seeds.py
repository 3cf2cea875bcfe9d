"""Noise belongs to images, not to batches."""

import torch

from base.seeds import SeededNoise


def test_noise_of_an_image_is_independent_of_the_batch():
    whole, part = SeededNoise(7, range(5), (3, 2, 2)), SeededNoise(7, [3, 1], (3, 2, 2))
    for _ in range(3):
        a, b = whole.draw(), part.draw()
        assert torch.equal(a[[3, 1]], b)


def test_noise_differs_between_images_seeds_and_draws():
    noise = SeededNoise(7, range(4), (3, 8, 8))
    draws = torch.cat(
        [noise.draw(), noise.draw(), SeededNoise(8, range(4), (3, 8, 8)).draw()]
    ).flatten(1)
    correlation = torch.corrcoef(draws) - torch.eye(12)
    assert correlation.abs().max() < 0.35  # 5 standard deviations of unrelated noise
    assert abs(float(draws.mean())) < 0.1 and abs(float(draws.std()) - 1) < 0.05

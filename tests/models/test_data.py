"""Image folders: order, labels, size, and what is wrong with them."""

import numpy as np
import pytest
import torch
from PIL import Image

from models.data import image_files, load_images, read_image


def save(path, grey, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)


def test_class_folders_give_labels_in_sorted_order(tmp_path):
    for split, shift in (("train", 0), ("test", 100)):
        save(tmp_path / split / "dog" / "1.png", 20 + shift)
        save(tmp_path / split / "cat" / "b.png", 11 + shift)
        save(tmp_path / split / "cat" / "a.png", 10 + shift)
    for split, shift in (("train", 0), ("test", 100)):
        images, labels = load_images(tmp_path, split)
        assert images.dtype == torch.uint8 and images.shape == (3, 3, 32, 32)
        assert images[:, 0, 0, 0].tolist() == [10 + shift, 11 + shift, 20 + shift]
        assert labels.tolist() == [0, 0, 1]


def test_plain_folder_has_label_zero_and_ignores_other_files(tmp_path):
    save(tmp_path / "x.png", 5)
    (tmp_path / "notes.txt").write_text("no image")
    images, labels = load_images(tmp_path)
    assert images[0, 0, 0, 0] == 5 and labels.tolist() == [0]


def test_only_the_chosen_images_are_read(tmp_path):
    for i in range(4):
        save(tmp_path / f"{i}.png", i)
    (tmp_path / "3.png").write_bytes(b"no image")
    images, labels = load_images(tmp_path, choose=lambda count: [count - 2, 0, 0])
    assert images[:, 0, 0, 0].tolist() == [2, 0, 0] and labels.tolist() == [0, 0, 0]


def test_other_sizes_are_cropped_to_the_central_square_and_resized(tmp_path):
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 200  # the central square
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 16) == 200).all()
    assert read_image(tmp_path / "wide.png").shape == (3, 40, 80)


def test_grey_images_become_rgb(tmp_path):
    Image.new("L", (32, 32), 77).save(tmp_path / "grey.png")
    assert (load_images(tmp_path)[0] == 77).all()


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        image_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no images"):
        load_images(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG but not really")
    with pytest.raises(ValueError, match="broken.png is not a readable image"):
        load_images(tmp_path)


def test_cifar10_that_cannot_be_fetched(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr("torchvision.datasets.CIFAR10", refuse)
    with pytest.raises(ValueError, match="could not be fetched into .*; give data=FOLDER"):
        load_images(f"cifar10:{tmp_path}")

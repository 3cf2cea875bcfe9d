"""Pictures are whole PNG files that show what was planted."""

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from PIL import Image
from tiny import normal

from tinydm.report.plots import (
    DOT_COLOUR,
    MOST,
    error_map,
    pooled,
    range_map,
    range_surface,
    score_chart,
)


def planted(num_steps, num_channels):
    """Ranges near 1, but one channel that reaches 9; and the timesteps."""
    r_abs = 1 + 0.1 * normal(num_steps, num_channels).abs()
    r_abs[:, num_channels // 3] = 9
    return r_abs, list(range(num_steps))[::-1]


def where(path, colour):
    """Which pixels of a picture (height, width) have the colour (r, g, b) in 0..1."""
    picture = Image.open(path)
    picture.verify()
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return abs(pixels - np.round(255 * np.array(colour[:3]))).max(axis=2) <= 1


def count(path, colour):
    return int(where(path, colour).sum())


@pytest.mark.parametrize("draw", [range_map, range_surface])
@pytest.mark.parametrize("shape", [(2, 2), (300, 2600)])
def test_one_channel_among_many_is_seen(tmp_path, draw, shape):
    draw(tmp_path / "figures/a.png", *planted(*shape), "planted")
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["a.png"]
    if draw is range_map:  # the colour bar alone has less of it
        assert count(tmp_path / "figures/a.png", colormaps["viridis"](1.0)) > 400


def test_pooling_keeps_small_tables_and_every_maximum():
    r = normal(7, MOST).numpy()
    values, steps, channels = pooled(r)
    assert (
        np.array_equal(values, r)
        and list(steps) == list(range(7))
        and list(channels) == list(range(MOST))
    )
    r = normal(2 * MOST + 1, 3).numpy()
    values, steps, channels = pooled(r)
    assert values.shape == (171, 3) and list(steps[:3]) == [0, 3, 6] and list(channels) == [0, 1, 2]
    assert np.array_equal(values, [r[i : i + 3].max(axis=0) for i in range(0, len(r), 3)])


def test_a_point_with_one_channel_has_a_map_but_no_surface(tmp_path):
    range_map(tmp_path / "a.png", torch.zeros(4, 1), [3, 2, 1, 0], "always zero")
    with pytest.raises(
        ValueError, match=r"two steps and two channels, found \(4, 1\); draw the map"
    ):
        range_surface(tmp_path / "b.png", torch.zeros(4, 1), [3, 2, 1, 0], "always zero")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_layers_without_error_are_grey(tmp_path):
    def rows(*errors):
        return [
            {
                "layer": f"layer{i}",
                "step": step,
                "t": 100.0 - step,
                "mse": mse,
                "mae": mse,
                "sqnr_db": 20.0 + step,
            }
            for i, mse in enumerate(errors)
            for step in range(5)
        ]

    grey = (211 / 255,) * 3
    for name, errors in (("none", (1, 1)), ("half", (0, 1)), ("all", (0, 0))):
        error_map(tmp_path / f"{name}.png", rows(*errors), name)
    found = [count(tmp_path / f"{name}.png", grey) for name in ("none", "half", "all")]
    assert found[1] > 10000 and found[0] < 0.02 * found[1] and found[2] > 1.8 * found[1]


def test_every_measure_of_error_has_its_panel(tmp_path):
    """From left to right MSE, MAE and SQNR are worst, and brightest, in the first, second and third
    layer."""
    layers = [
        {"mse": 1, "mae": 1e-3, "sqnr_db": 30},
        {"mse": 1e-3, "mae": 1, "sqnr_db": 30},
        {"mse": 1e-3, "mae": 1e-3, "sqnr_db": 10},
    ]
    error_map(
        tmp_path / "a.png",
        [
            {"layer": str(i), "t": 5.0 - step} | layer
            for i, layer in enumerate(layers)
            for step in range(5)
        ],
        "planted",
    )
    found = where(tmp_path / "a.png", colormaps["viridis"](1.0))
    found = found[: round(0.7 * len(found))]  # below are the colour bars
    heights = [part.nonzero()[0].mean() for part in np.array_split(found, 3, axis=1)]
    assert heights[0] < heights[1] - 20 < heights[2] - 40


def test_scores_lie_at_their_mean_between_the_full_precision_lines(tmp_path):
    """Rows with means 2 and 8, lines at 0 and 10, one row without a number."""
    rows = [([1.0, 3.0], 0.0), ([], None), ([8.0], 10.0)]
    score_chart(tmp_path / "a.png", ["first", "second", "third"], {"score, dB": rows})
    dots, lines = (
        where(tmp_path / "a.png", colour) for colour in (to_rgb(DOT_COLOUR), to_rgb("grey"))
    )
    top = round(0.2 * len(dots))  # above is the legend
    y, x = dots[top:].nonzero()
    first, last = x[y < y.mean()], x[y > y.mean()]
    left, right = (lines[top:].sum(axis=0) > 40).nonzero()[0][[0, -1]]
    assert (first.min() + first.max()) / 2 == pytest.approx(left + 0.2 * (right - left), abs=3)
    # a deviation to each side
    assert np.ptp(first) == pytest.approx(2 * 2**0.5 * (right - left) / 10, abs=6)
    assert (last.min() + last.max()) / 2 == pytest.approx(
        left + 0.8 * (right - left), abs=3
    ) and np.ptp(last) < 20


def test_scores_of_different_magnitude_are_on_a_logarithmic_axis(tmp_path):
    score_chart(
        tmp_path / "a.png",
        ["first", "second", "third"],
        {"FD": [([value], None) for value in (0.01, 0.1, 1)]},
    )
    dots = where(tmp_path / "a.png", to_rgb(DOT_COLOUR))
    dots = dots[round(0.2 * len(dots)) :].any(axis=0).nonzero()[0]  # above is the legend
    first, second, third = (
        part.mean() for part in np.split(dots, (np.diff(dots) > 20).nonzero()[0] + 1)
    )
    assert second - first == pytest.approx(third - second, abs=2)


def test_a_failed_picture_leaves_the_old_one(tmp_path, monkeypatch):
    range_map(tmp_path / "a.png", *planted(3, 3), "planted")
    before = (tmp_path / "a.png").read_bytes()

    def fail(*_, **__):
        raise OSError("broken")

    monkeypatch.setattr("tinydm.report.plots.Figure.savefig", fail)
    with pytest.raises(OSError, match="broken"):
        range_map(tmp_path / "a.png", *planted(3, 3), "planted")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and (
        tmp_path / "a.png"
    ).read_bytes() == before

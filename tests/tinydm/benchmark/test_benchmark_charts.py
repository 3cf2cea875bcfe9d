"""Charts are whole PNG files with the colours of what was measured."""

from dataclasses import replace

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image
from test_benchmark_report import ROW, SLOW

from tinydm.benchmark.charts import MARKS, SIZE_COLOURS, draw_sizes, draw_speed, marks_of


def count(path, colour):
    """Pixels of a colour."""
    Image.open(path).verify()
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(pixels - np.round(255 * np.array(to_rgb(colour)))).max(axis=2) <= 1).sum())


def test_longer_bars_for_larger_files(tmp_path):
    path = tmp_path / "charts/size.png"
    draw_sizes([ROW, replace(ROW, network="other")], path)
    areas = [count(path, colour) for colour in SIZE_COLOURS.values()]
    assert areas[0] > areas[1] > areas[2] > 1000


def test_a_panel_for_each_machine_and_a_dot_for_each_variant(tmp_path):
    one, two = tmp_path / "one.png", tmp_path / "two.png"
    draw_speed([ROW], one)
    draw_speed([ROW, replace(ROW, machine=SLOW)], two)
    assert Image.open(two).width > 1.5 * Image.open(one).width
    run = replace(ROW, steps=20, machine=SLOW)
    draw_speed([run, replace(ROW, clean=0)], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_the_first_widths_are_shown_and_quantized_before_float():
    seconds = {key: [1.0] for key in ("fp32", "openvino", "openvino w4a8", "bf16", "integer w4a8")}
    row = replace(ROW, seconds=seconds | {"integer w8a8": [1.0], "compiled w4a8": []})
    assert list(marks_of(row)) == ["bf16", "openvino w4a8", "integer w4a8"]
    assert marks_of(row)["bf16"] == MARKS["bf16"]

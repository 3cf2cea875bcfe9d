"""Pictures inside the page: the same bytes every time, and what they leave out."""

import base64
import io

import numpy as np
from PIL import Image

from tinydm.report.figures import data_uri, draw_block_errors, draw_grid, draw_sqnr


def content(uri, kind):
    head, _, text = uri.partition(",")
    assert head == f"data:image/{kind};base64"
    return base64.b64decode(text)


def test_an_address_holds_its_image():
    assert content(data_uri(b"abc", "png"), "png") == b"abc"


def test_drawings_are_the_same_bytes_every_time_and_names_are_no_formulas():
    runs = [{"name": "a $x^{", "curve": [(0, 20.0), (1, 30.0)]}, {"name": "none", "curve": []}]
    rows = [{"pass": "p", "unit": "u $", "error_before": 0.1, "error_after": 0.02}]
    for draw, argument in ((draw_sqnr, runs), (draw_block_errors, rows)):
        first = content(draw(argument), "svg+xml")
        assert first == content(draw(argument), "svg+xml") and b"<svg" in first


def test_nothing_to_draw_is_no_picture():
    assert draw_sqnr([]) == draw_sqnr([{"name": "a", "curve": []}]) == ""
    rows = [{"pass": "p"}, {"pass": "p", "error_before": 0.0, "error_after": 0.0}]
    assert draw_block_errors(None) == draw_block_errors(rows) == ""


def test_a_panel_for_each_phase_of_the_passes():
    rows = [
        {"pass": "p", "phase": phase, "unit": "u", "error_before": 1.0, "error_after": 0.5}
        for phase in ("weight", "input", "weight")
    ]
    assert content(draw_block_errors(rows), "svg+xml").count(b'<g id="axes_') == 2


def test_grids_show_images_in_order(tmp_path):
    """Small ones eight in a row at twice their size, large ones four in a row at 128 pixels."""
    for folder, side, num in (("small", 32, 10), ("large", 256, 20)):
        (tmp_path / folder).mkdir()
        for i in range(num):
            Image.new("RGB", (side, side), (10 * i,) * 3).save(tmp_path / folder / f"{i:02d}.png")
    for folder, columns, side, zoom, num in (("small", 8, 32, 2, 10), ("large", 4, 128, 1, 16)):
        names = sorted(path.name for path in (tmp_path / folder).iterdir())
        grid = draw_grid(tmp_path / folder, names, "a caption")
        sheet = np.array(Image.open(io.BytesIO(content(grid["src"], "png"))))
        rows = -(-num // columns)
        assert sheet.shape == (rows * (side + 1) - 1, columns * (side + 1) - 1, 3)
        assert (grid["height"], grid["width"]) == (zoom * sheet.shape[0], zoom * sheet.shape[1])
        assert (grid["count"], grid["first"], grid["last"]) == (num, "00", f"{num - 1:02d}")
        for i in range(num):
            y, x = (place * (side + 1) + side // 2 for place in divmod(i, columns))
            assert (sheet[y, x] == 10 * i).all()

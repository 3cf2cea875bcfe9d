"""Elements of a page: what is escaped, how numbers are written, the same bytes for the same
figure."""

import base64
import re

import matplotlib
from matplotlib.figure import Figure

from tinydm.report.markup import Html, data_uri, document, drawing, element, number, table


def test_text_is_escaped_on_its_way_in_and_markup_is_not():
    inner = element("b", '1 < 2 & "3"')
    assert inner == "<b>1 &lt; 2 &amp; &quot;3&quot;</b>"
    assert element("p", inner, "<i>") == f"<p>{inner}&lt;i&gt;</p>"
    assert (
        element("img", src='a"b', class_="x", http_equiv="y")
        == '<img src="a&quot;b" class="x" http-equiv="y">'
    )


def test_numbers_for_a_reader():
    values = (None, 1234567, 1234.5678, 0.5, 0.0012345, 0.0, float("inf"), True, "x")
    assert [number(value) for value in values] == [
        "–",
        "1,234,567",
        "1,234.568",
        "0.5",
        "0.00123",
        "0.000",
        "inf",
        "True",
        "x",
    ]
    assert number(2.25, 1) == "2.2"


def test_numbers_stand_right_and_text_left():
    page = table(["a", "b"], [["x", 1.5], ["<y>", Html("2<small>s</small>")]])
    assert re.findall('<th scope="col" class="(.*?)">', page) == ["text", "number"]
    assert '<td class="text">&lt;y&gt;</td><td class="number">2<small>s</small></td>' in page


def test_a_drawing_is_an_image_inside_the_page_of_the_same_bytes_every_time():
    assert (
        base64.b64decode(data_uri(b"abc", "png").removeprefix("data:image/png;base64,")) == b"abc"
    )
    with matplotlib.rc_context({"svg.hashsalt": "tinydm"}):
        first, second = (drawing(curve(), "a curve") for _ in range(2))
    assert (
        first == second
        and first.startswith('<img src="data:image/svg+xml;base64,')
        and 'alt="a curve"' in first
    )


def curve():
    figure = Figure()
    figure.subplots().plot([0, 1], [1, 0])
    return figure


def test_a_document_is_whole_and_may_load_nothing():
    page = document("a & b", element("h1", "c"))
    assert page.startswith('<!DOCTYPE html>\n<html lang="en">') and page.endswith(
        "<body><h1>c</h1></body></html>\n"
    )
    assert "<title>a &amp; b</title>" in page and "default-src &#x27;none&#x27;" in page

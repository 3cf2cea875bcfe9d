"""Elements of an HTML page that stands alone: escaped text, tables of numbers, images inside the
file."""

import base64
import html
import io
import math

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2126; background: #fff; max-width: 76rem; margin: 2rem auto;
       padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.35rem; border-top: 2px solid #1c2126; margin-top: 3rem;
     padding-top: 0.6rem; } h3 { font-size: 1.05rem; margin: 2rem 0 0.5rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.9rem 0.3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid #dde2e6; }
th { font-weight: 600; } .number { text-align: right; } td.number { white-space: nowrap; }
td small, th small { display: block; color: #5c6670; font-weight: 400; }
.wide { overflow-x: auto; } .grids { display: flex; flex-wrap: wrap; gap: 1.5rem; } figure { margin: 0; }
figcaption, .missing, .note { color: #5c6670; font-size: 0.875rem; } .missing code { color: #1c2126; }
img { max-width: 100%; } img.pixels { image-rendering: pixelated; max-width: none; }
code { font-size: 0.85em; background: #f2f4f5; padding: 0.1em 0.3em; overflow-wrap: anywhere; }
"""


class Html(str):
    """Text that is already markup; any other text is escaped when it enters an element."""


def element(tag, *children, **attributes):
    inside = "".join(
        child if isinstance(child, Html) else html.escape(str(child)) for child in children
    )
    words = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return Html(f"<{tag}{words}>" if tag in ("img", "meta") else f"<{tag}{words}>{inside}</{tag}>")


def number(value, digits=3):
    """A number for a reader: `digits` decimals, or significant digits below 1; a dash where there
    is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–" if value is None else str(value)
    if isinstance(value, int) or not math.isfinite(value):
        return f"{value:,}"
    return f"{value:,.{digits}f}" if abs(value) >= 1 or value == 0 else f"{value:.{digits}g}"


def table(head, rows):
    """Columns of numbers (or of Html made from numbers) are set right, columns of text left."""
    sides = [
        "text" if any(type(row[i]) is str for row in rows) else "number" for i in range(len(head))
    ]
    titles = [element("th", title, scope="col", class_=side) for title, side in zip(head, sides)]
    body = [
        element(
            "tr",
            *(
                element("td", value if isinstance(value, str) else number(value), class_=side)
                for value, side in zip(row, sides)
            ),
        )
        for row in rows
    ]
    content = element("table", element("thead", element("tr", *titles)), element("tbody", *body))
    return element("div", content, class_="wide")


def data_uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def drawing(figure, alt):
    """A matplotlib figure as an SVG image inside the page, the same bytes every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return element("img", src=data_uri(buffer.getvalue(), "svg+xml"), alt=alt)


def document(title, *body):
    """A whole page as text. Its policy lets a browser load and run nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("title", title),
        element("style", Html(STYLE)),
    )
    return "<!DOCTYPE html>\n" + element("html", head, element("body", *body), lang="en") + "\n"

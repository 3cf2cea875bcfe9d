"""The figure of a comparison: which numbers of which rows it is given."""

from tinydm.report import chart
from tinydm.report.table import Row


def test_the_figure_has_each_row_beside_its_own_full_precision(monkeypatch):
    def row(bits, method, protocol, *numbers):
        found = [
            {"Size MB": 1.0, "FD-net": fd} | ({"PSNR dB": psnr} if psnr else {})
            for fd, psnr in numbers
        ]
        return Row(
            "tiny", 20, bits, method, protocol, runs=["run"] * (bits != "32/32"), numbers=found
        )

    rows = [
        row("32/32", "full precision", "a", (2.0, None)),
        row("32/32", "full precision", "b", (5.0, None)),
        row("4/8", "m (x)", "a", (3.0, 30.0), (4.0, 31.0)),
        row("8/8", "m (x)", "b", (6.0, 40.0)),
        Row("tiny", 20, "8/8", "m (y)", "b", note="failed"),
    ]
    charts = []
    monkeypatch.setattr(chart, "score_chart", lambda *drawn: charts.append(drawn))
    chart.draw(rows, "a.png")
    assert charts == [
        (
            "a.png",
            ["W4A8", "W8A8"],
            {
                "FD-net (lower is better)": [([3.0, 4.0], 2.0), ([6.0], 5.0)],
                "PSNR to full precision, dB": [([30.0, 31.0], None), ([40.0], None)],
            },
        )
    ]
    chart.draw(rows[:3], "b.png")
    assert charts[1][1] == ["m (x)"]
    chart.draw(rows[-1:], "c.png")
    assert len(charts) == 2

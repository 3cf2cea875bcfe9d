"""The picture of a comparison's rows."""

from collections.abc import Sequence
from pathlib import Path

from tinydm.report.plots import score_chart
from tinydm.report.table import Row, columns_of, words_of


def draw(rows: Sequence[Row], path: Path | str) -> None:
    """Draws PSNR and FD of every row with numbers, beside the FD of the full-precision model under
    the same protocol. Labels say what tells the rows apart."""
    done = [row for row in rows if row.runs]
    if not done:
        return
    full = {row.protocol: row for row in rows if row.numbers and not row.runs}
    words = [(row.model, words_of(row.bits), row.method) for row in done]
    varied = [i for i, values in enumerate(zip(*words)) if len(set(values)) > 1] or [2]
    panels = {}
    for column in columns_of(done):
        if not column.startswith(("PSNR", "FID", "FD")):
            continue
        title = f"{column} (lower is better)"
        if column == "PSNR dB":
            title = "PSNR to full precision, dB"
        panels[title] = [(row.values(column), full[row.protocol].mean(column)) for row in done]
    score_chart(path, [", ".join(row[i] for i in varied) for row in words], panels)

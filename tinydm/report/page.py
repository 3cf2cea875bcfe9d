"""One static HTML file about one or several run folders: tables, plots and image grids, all inside
the file.

The page loads nothing and runs nothing, all text from the runs is escaped, a file that a run lacks
is named with the command that makes it, and the same run folders give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from base.files import write_atomically
from tinydm.report.figures import draw_block_errors, draw_grids, draw_sqnr
from tinydm.report.reading import number, read_run, summarize
from tinydm.report.table import Table

TEMPLATES = Path(__file__).parent / "templates"


def write_report(
    runs: Sequence[Path | str], path: Path | str, comparison: Sequence[Table] = ()
) -> Path:
    """Write the page about the run folders `runs` to `path`, whole or not at all, and return it.
    `comparison`, tables of texts as (caption, head, lines), comes first. Raises ValueError where
    there is nothing to write about, and for what `read_run` refuses."""
    if not runs and not comparison:
        raise ValueError("no run folder was given; name at least one")
    read = [read_run(folder) for folder in runs]
    for run in read:
        run |= {"grids": draw_grids(run), "block_errors": draw_block_errors(run["passes"])}
    found = {"runs": read, "summary": summarize(read), "sqnr": draw_sqnr(read)}
    found["comparison"] = [_compared(*part) for part in comparison]
    page = template_environment().get_template("page.html.j2").render(found)
    path = Path(path)
    write_atomically(path, lambda part: part.write_text(page, encoding="utf-8"))
    return path


def template_environment() -> Environment:
    """Templates of this folder, which escape all text that enters them."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    return environment


def _compared(caption: str, head: list[str], lines: list[list[str]]) -> dict[str, Any]:
    """Columns with letters in them are text."""
    columns = [[line[i] for line in lines] for i in range(len(head))]
    sides = ["text" if any(map(str.isalpha, "".join(column))) else "number" for column in columns]
    return {"caption": caption, "head": head, "lines": lines, "sides": sides}

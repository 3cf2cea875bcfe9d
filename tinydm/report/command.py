"""One static page about run folders:  python scripts/report.py RUN [RUN ...] [out=report.html]"""

from pathlib import Path

from base.config import split_arguments
from tinydm.report.page import write_report
from tinydm.run_folder import open_run


def run(arguments: list[str]) -> None:
    """Write the page that a command line asks for."""
    folders, words = split_arguments(arguments)
    unknown = [w for w in words if not w.startswith("out=")]
    if unknown or not folders:
        raise ValueError(f"expected run folders and out=FILE, found {' '.join(arguments)}")
    for folder in folders:
        open_run(folder)
    path = Path(words[0].removeprefix("out=")) if words else Path(folders[0]) / "report.html"
    print(f"report: {write_report(folders, path)}")

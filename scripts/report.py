"""One static page about one or several run folders:  python scripts/report.py RUN [RUN ...] [out=report.html]"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from evaluation.report import write_report  # noqa: E402
from scripts.cli import main, split_arguments  # noqa: E402
from scripts.run_folder import open_run  # noqa: E402


def run(arguments):
    folders, words = split_arguments(arguments)
    unknown = [w for w in words if not w.startswith("out=")]
    if unknown or not folders:
        raise ValueError(f"expected run folders and out=FILE, found {' '.join(arguments)}")
    for folder in folders:
        open_run(folder)
    path = Path(words[0].removeprefix("out=")) if words else Path(folders[0]) / "report.html"
    write_report([Path(f) for f in folders], path)
    print(f"report: {path}")


if __name__ == "__main__":
    main(run)

"""The command of tinydm/report/documents.py, which explains it: python scripts/readme.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import main  # noqa: E402
from tinydm.report.documents import run  # noqa: E402

if __name__ == "__main__":
    main(run)

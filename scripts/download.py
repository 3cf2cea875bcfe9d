"""The command of models/download.py, which explains it: python scripts/download.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import main  # noqa: E402
from models.download import run  # noqa: E402

if __name__ == "__main__":
    main(run)

"""tinydm export, which explains itself:  python scripts/export.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tinydm.cli import main  # noqa: E402

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])

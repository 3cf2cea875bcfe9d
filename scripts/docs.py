"""The command of tinydm/report/documents.py, which explains it:  python scripts/docs.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import asks_for_help, guard  # noqa: E402
from tinydm.report import documents  # noqa: E402

if __name__ == "__main__":
    words = sys.argv[1:]
    print(documents.__doc__.strip()) if asks_for_help(words) else guard(documents.run, words)

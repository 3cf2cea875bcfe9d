"""The command of tinydm/stages/sample.py, which explains it: python scripts/sample.py --help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import main  # noqa: E402
from tinydm.stages.sample import run  # noqa: E402

if __name__ == "__main__":
    main(run)

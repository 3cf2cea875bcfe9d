"""The command of tinydm/stages/retabulate.py, which explains it: python scripts/retabulate.py
--help"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from base.errors import main  # noqa: E402
from tinydm.stages.retabulate import run  # noqa: E402

if __name__ == "__main__":
    main(run)

#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Run the tests; sets up what is missing first:  bash scripts/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
# The tests' networks are tiny: one thread is fastest, and several times so on a busy machine; so tests run side by side.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest -q -n auto --maxprocesses=4 --dist worksteal "$@"

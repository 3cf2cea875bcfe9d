#!/usr/bin/env bash
# Run the tests; sets up what is missing first:  bash scripts/test.sh [pytest options]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
# The tests' networks are tiny: two threads that sleep while they wait are fastest, on a busy machine too.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
exec "$PYTHON" -m pytest -q "$@"

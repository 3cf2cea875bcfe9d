#!/usr/bin/env bash
# The results table of the README: every row by its own run folder, then one table and one report.
#   bash scripts/results.sh [key=value ...]       e.g. sampling.num=1024 ; started again it continues
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
METHODS=${METHODS:-minmax qdiffusion} WIDTHS=${WIDTHS:-w8a8 w6a6 w4a8 w4a4}
ROOT=${ROOT:-runs/results}
runs=()
for bits in $WIDTHS; do
  for method in $METHODS; do
    OUT=$ROOT/$method-$bits METHOD=$method BITS=$bits bash sample_cifar.sh "$@"
    runs+=("$ROOT/$method-$bits")
  done
done
. scripts/setup.sh
"$PYTHON" scripts/report.py "${runs[@]}" out="$ROOT/report.html"
"$PYTHON" scripts/table.py "${runs[@]}" out="$ROOT/table.md"

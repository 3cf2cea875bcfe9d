#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# What only a GPU can tell, in under 10 minutes: the tests that need one, then the benchmark.
#   bash scripts/check_gpu.sh                       OUT (runs/check_gpu) gets block.md, for docs/integer.md, and logs
#   bash scripts/check_gpu.sh batches=[8,32]        words for the benchmark
#   PYTHON=python3 bash scripts/check_gpu.sh        a Python as it is: nothing is looked for or installed
# Each part is cut off at its time; what it has by then is told. Fails where a test does, or nothing was measured.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for word in "$@"; do
  case "$word" in
    *=*) ;;
    *) echo "error: '$word' is not key=value; words are those of 'tinydm benchmark'" >&2
       exit 2 ;;
  esac
done
OUT=${OUT:-runs/check_gpu}
TEST_SECONDS=${TEST_SECONDS:-270} SPEED_SECONDS=${SPEED_SECONDS:-140}      # the latter for each network
[ -n "${PYTHON-}" ] || . scripts/setup.sh

if ! versions="$("$PYTHON" - 2>/dev/null <<'END'
import torch, triton
print(f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
      f"Triton {triton.__version__}, compute {'.'.join(map(str, torch.cuda.get_device_capability()))}")
END
)"; then
  echo "error: $PYTHON sees no GPU (it needs PyTorch for CUDA, Triton and a card); nothing was checked" >&2
  exit 2
fi
card="$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | head -n 1)"
echo "$card; $versions"
mkdir -p "$OUT"

# A few processes, which share the card; each has one thread of the processor.
tests=failed
timeout "$TEST_SECONDS" env OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m cuda -n 6 --dist worksteal --durations=10 \
  tests/cuda tests/quant/integer 2>&1 | tee "$OUT/tests.log" && tests=passed
told='^(FAILED|ERROR) |^[0-9]+ (passed|failed|skipped|error)'
summary="$(grep -E "$told" "$OUT/tests.log" || echo "no result after $TEST_SECONDS s, see tests.log")"

# One network a call, so that the first one stays if there is no time for the next.
for network in bedroom cifar10; do
  timeout "$SPEED_SECONDS" "$PYTHON" scripts/benchmark.py device=cuda "networks=[$network]" "batches=[32]" "bits=[w4a8]" \
    rounds=10 seconds=20 "$@" out="$OUT" || echo "$network: cut off or not measured"
done
[ ! -f "$OUT/benchmark.jsonl" ] || "$PYTHON" scripts/benchmark.py "networks=[]" out="$OUT"

{
  echo "### On a GPU, $(date -u +%Y-%m-%d)"
  echo
  echo "$card; $versions. Made by \`bash scripts/check_gpu.sh${*:+ $*}\`. Tests that need a GPU $tests:"
  echo
  sed 's/^/    /' <<< "$summary"
  echo
  cat "$OUT/benchmark.md" 2>/dev/null || echo "Nothing was measured."
} > "$OUT/block.md"
cat "$OUT/block.md"
[ "$tests" = passed ] && [ -f "$OUT/benchmark.md" ]

# The stages of one run in order; sourced by the sample_*.sh drivers, which set MODEL.
# Knobs from the environment: MODEL METHOD BITS NUM PRESET OUT; key=value words go to the configuration.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for word in "$@"; do
  case "$word" in
    *=*) ;;
    *) echo "error: '$word' is not key=value; knobs (MODEL= METHOD= BITS= NUM= PRESET= OUT=) stand in front of the" \
            "command" >&2
       exit 2 ;;
  esac
done

METHOD=${METHOD:-qdiffusion} BITS=${BITS:-w4a8} PRESET=${PRESET:-demo}
RUN=${OUT:-runs/$MODEL/$METHOD-$BITS-$PRESET}

. scripts/setup.sh

# Threads that sleep while they wait: a few percent slower on an idle machine, several times faster on a busy one.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-0}

force=()
for word in "$@"; do [ "$word" = force=true ] && force=(force=true); done

"$PYTHON" scripts/calibrate.py "configs/model/$MODEL.yaml" "configs/bits/$BITS.yaml" "configs/method/$METHOD.yaml" \
  "configs/preset/$PRESET.yaml" "$@" out="$RUN" ${NUM:+sampling.num=$NUM}
"$PYTHON" scripts/quantize.py "$RUN" "${force[@]}"
"$PYTHON" scripts/sample.py "$RUN" "${force[@]}"
"$PYTHON" scripts/sample.py "$RUN" precision=float
"$PYTHON" scripts/evaluate.py "$RUN" "${force[@]}"
"$PYTHON" scripts/report.py "$RUN"
echo "Look at $RUN/report.html (one page) and $RUN/samples/ (the quantized model's images)."

#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Fetch public checkpoints into models; `--help` tells more. Needs Python 3.10 or newer and nothing else.
set -euo pipefail
if ! python="$(command -v python3 || command -v python)"; then
    echo "error: no python3 is on the PATH; install Python 3.10 or newer" >&2
    exit 2
fi
exec "$python" "$(dirname "${BASH_SOURCE[0]}")/download.py" "$@"

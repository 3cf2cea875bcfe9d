#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# As sample_bedroom.sh, for LSUN churches (LDM-8, 400 steps, which the uniform sequence makes 500).
#   bash scripts/for_church.sh
#   MODEL=latent-compact bash scripts/for_church.sh         the same pipeline on a small model that ships
MODEL=${MODEL:-church}
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

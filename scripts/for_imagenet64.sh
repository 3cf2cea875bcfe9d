#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# As sample_cifar.sh, for the unconditional ImageNet 64x64 model of improved diffusion (4000 steps, 250 of them drawn).
#   bash scripts/for_imagenet64.sh
#   MODEL=cifar10-compact bash scripts/for_imagenet64.sh    the same pipeline on a small model that ships
MODEL=${MODEL:-imagenet64}
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Quantize a CIFAR-10 diffusion model and draw images with it: calibrate -> quantize -> sample -> evaluate -> report.
#   bash sample_cifar.sh                                              the model that ships with the project, W4A8
#   MODEL=cifar10 METHOD=minmax BITS=w8a8 NUM=1024 bash sample_cifar.sh sampling.steps=50 [key=value ...]
# Run again it continues, or says what is done.
MODEL=${MODEL:-cifar10-compact}
. "$(dirname "${BASH_SOURCE[0]}")/scripts/stages.sh"

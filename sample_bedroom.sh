#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Quantize the latent-diffusion model of LSUN bedrooms (LDM-4, 200 steps, eta 1) and draw images with it:
# calibrate -> quantize -> sample -> evaluate -> report. Knobs as in sample_cifar.sh.
#   bash sample_bedroom.sh                                  the public checkpoint
#   MODEL=latent-compact bash sample_bedroom.sh              the same pipeline on a small model that ships
MODEL=${MODEL:-bedroom}
. "$(dirname "${BASH_SOURCE[0]}")/scripts/stages.sh"

#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Quantize the class-conditional latent-diffusion model of ImageNet (LDM-4, 20 steps, guidance 3.0) and draw images with
# it: calibrate -> quantize -> sample -> evaluate -> report. Knobs as in sample_cifar.sh.
#   bash sample_imagenet.sh                                 the public checkpoint
#   bash sample_imagenet.sh sampling.steps=250 guidance.scale=1.5 sampling.eta=1.0
#   MODEL=latent-compact-class bash sample_imagenet.sh      the same pipeline on a small model that ships
MODEL=${MODEL:-imagenet}
. "$(dirname "${BASH_SOURCE[0]}")/scripts/stages.sh"

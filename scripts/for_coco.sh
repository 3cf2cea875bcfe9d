#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Quantize Stable Diffusion v1.4 (PLMS, 50 steps, guidance 7.5) and draw what prompts say:
# calibrate -> quantize -> sample -> evaluate -> report. Knobs as in sample_cifar.sh.
#   bash scripts/for_coco.sh sampling.prompts=captions_val2014.json          COCO captions, or a text file
#   MODEL=latent-compact-class bash scripts/for_coco.sh      the same pipeline on a small model that ships
MODEL=${MODEL:-sd-v1-4}
[ "$MODEL" != sd-v1-4 ] || set -- effort.batch_size=8 "$@"      # an attention map of one image takes 0.5 GB
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

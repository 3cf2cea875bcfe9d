#!/usr/bin/env bash
# Quantize Stable Diffusion v1.4 (PLMS, 50 steps, guidance 7.5) and draw what prompts say:
# calibrate -> quantize -> sample -> evaluate -> report. Knobs as in sample_cifar.sh.
#   bash scripts/for_coco.sh sampling.prompts=captions_val2014.json          COCO captions, or a text file
#   MODEL=latent-compact-class bash scripts/for_coco.sh      the same pipeline on a small model that ships
MODEL=${MODEL:-sd-v1-4}
if [ "$MODEL" = sd-v1-4 ]; then            # softmax outputs of 4,096 keys want more bits; an attention map takes 0.5 GB
  words=(bits.softmax=16 effort.batch_size=8 pass_options.fit_ranges.batch_size=4)
  case ${METHOD:-qdiffusion} in
    minmax | uniform | i2n | di2n | ptq4dm) ;;
    *) words+=(pass_options.reconstruct.capture_batch=4) ;;
  esac
  set -- "${words[@]}" "$@"
fi
. "$(dirname "${BASH_SOURCE[0]}")/stages.sh"

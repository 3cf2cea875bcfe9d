#!/usr/bin/env bash
[ -n "${BASH_VERSION-}" ] || exec bash "$0" "$@"      # sh may be another shell
# Fetch the published autoencoders into models/first_stage_models: NAME ... | --all | --list. The latent models have
# copies of their own inside and do not need these.
exec bash "$(dirname "${BASH_SOURCE[0]}")/download_models.sh" "$@" --first-stages

"""Where the Inception weights of every published FID are found."""

from pathlib import Path

import torch
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

from evaluation.extractors.cifar_resnet import sha256

INCEPTION_SHA256 = "6726825d"  # first digits, as in the name of the file
# the same bytes
INCEPTION_NAMES = (URL_INCEPTION_V3.rsplit("/", 1)[1], "pt_inception-2015-12-05-6726825d.pth")
OFFLINE = (
    "scores use the offline extractor cifar-resnet and do not compare with published FID: "
    "no Inception weights {where}; give evaluation.inception_path=FILE ({name})"
)


def find_inception(path="", *, fetch=False):
    """-> file of the Inception weights or None, and where it was looked for.

    `path` names the file; without it torch hub's cache is searched, and with `fetch` the file is
    downloaded into it."""
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    files = [Path(path)] if path else [cache / name for name in INCEPTION_NAMES]
    found = next((file for file in files if file.is_file()), None)
    if path and not found:
        raise ValueError(
            f"inception_path {path} does not exist; give the file {INCEPTION_NAMES[0]}"
        )
    if found and not sha256(found).startswith(INCEPTION_SHA256):
        raise ValueError(
            f"{found} is not the Inception file of 2015-12-05: its SHA-256 should begin with "
            f"{INCEPTION_SHA256}; fetch it again from {URL_INCEPTION_V3}"
        )
    if found or not fetch:
        return found, "in torch hub's cache"
    cache.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, str(files[0]), INCEPTION_SHA256, progress=False
        )
    except (OSError, RuntimeError) as error:
        return None, f"in torch hub's cache, and the download failed ({error})"
    return files[0], "downloaded"

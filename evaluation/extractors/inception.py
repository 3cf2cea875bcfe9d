"""The extractor of every published FID, and where its weights are found."""

import pickle
from pathlib import Path

import torch
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from base.files import sha256
from evaluation.extractors.extractor import Extractor

URL = fidelity.URL_INCEPTION_V3
INCEPTION_SHA256 = "6726825d"  # first digits, as in the name of the file
# two names of the same bytes
INCEPTION_NAMES = (URL.rsplit("/", 1)[1], "pt_inception-2015-12-05-6726825d.pth")


class Inception(Extractor):
    """torch-fidelity's port of the TensorFlow graph of 2015-12-05: pooled features (N, 2048) and
    logits without bias (N, 1008) of uint8 images (N, 3, H, W)."""

    name = "inception"
    spatial_layer = "net.Mixed_6d.branch1x1"  # maps of 17x17

    def __init__(self, weights: Path | str):
        super().__init__(weights)
        try:
            # The class below reads the file in a way that would run what a pickle asks for.
            torch.load(weights, weights_only=True, map_location="cpu")
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"{weights} does not hold tensors alone ({reason}); fetch it again from {URL}"
            ) from None
        build, layers = fidelity.FeatureExtractorInceptionV3, ["2048", "logits_unbiased"]
        self.net = build(self.name, layers, feature_extractor_weights_path=str(weights))

    @classmethod
    def find_weights(cls, path: str = "", *, fetch: bool = False) -> tuple[Path | None, str]:
        """As of every extractor; without `path` torch hub's cache is searched, and with `fetch`
        filled. Raises ValueError if `path` does not exist or the file found has other bytes."""
        cache = Path(torch.hub.get_dir()) / "checkpoints"
        files = [Path(path)] if path else [cache / name for name in INCEPTION_NAMES]
        found = next((file for file in files if file.is_file()), None)
        name = INCEPTION_NAMES[0]
        if path and not found:
            raise ValueError(f"inception_path {path} does not exist; give the file {name}")
        if found and not sha256(found).startswith(INCEPTION_SHA256):
            raise ValueError(
                f"{found} is not the Inception file of 2015-12-05: its SHA-256 should begin with "
                f"{INCEPTION_SHA256}; fetch it again from {URL}"
            )
        if found or not fetch:
            return found, "in torch hub's cache"
        cache.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL, str(files[0]), INCEPTION_SHA256, progress=False)
        except (OSError, RuntimeError) as error:
            return None, f"in torch hub's cache, and the download failed ({error})"
        return files[0], "downloaded"

    @classmethod
    def score_name(cls, score: str) -> str:
        return {"FD": "FID", "sFD": "sFID"}.get(score, score)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(x)

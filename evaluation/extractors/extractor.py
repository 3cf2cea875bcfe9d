"""What every feature extractor of the distribution scores says of itself."""

from pathlib import Path

import torch
from torch import nn


class Extractor(nn.Module):
    """Turns uint8 images (N, 3, H, W) into pooled features (N, D) and logits of classes (N, C).

    A new extractor is a subclass in a file of its own and a row in choice.EXTRACTORS."""

    name: str
    spatial_layer: str  # the module whose maps are the features of sFD
    image_size: int | None = None  # of the images that it takes; None = any
    statistics: Path | None = None  # shipped file of reference statistics

    def __init__(self, weights: Path | str):
        super().__init__()
        self.weights = Path(weights)

    @classmethod
    def find_weights(cls, path: str = "", *, fetch: bool = False) -> tuple[Path | None, str]:
        """-> file of the weights or None, and where it was looked for. `path` names the file; with
        `fetch` it may be downloaded."""
        raise NotImplementedError

    @classmethod
    def score_name(cls, score: str) -> str:
        """The name of `score` when its features are of this extractor. Published names belong to
        Inception; the name of any other extractor is part of the score's."""
        score, dash, std = score.partition("-std")
        return f"{score}-{cls.name}{dash}{std}"

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

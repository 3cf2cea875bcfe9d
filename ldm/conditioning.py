"""What latent diffusion is conditioned on: a class embedding, or the CLIP text encoder (Radford et
al. 2021, arXiv:2103.00020) of Stable Diffusion.

Parameter names are those of the public checkpoints (`cond_stage_model.` without that prefix).

Axes: N images, T tokens, D features."""

import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from base.files import PROJECT

TOKENIZER = "models/tokenizer/clip-vit-large-patch14"  # below the project
VOCABULARY = ("vocab.json", "merges.txt")


class ClassEmbedder(nn.Module):
    """A learned vector per class, as a context of one token."""

    def __init__(self, *, n_classes: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_classes, embed_dim)

    def forward(self, labels: torch.Tensor) -> torch.Tensor:
        """(N,) integers -> (N, 1, D)."""
        return self.embedding(labels)[:, None]


def clip_library() -> ModuleType:
    """Imports the package that has CLIP. Raises ValueError where it is not installed."""
    try:
        import transformers
    except ModuleNotFoundError as error:
        if error.name != "transformers":  # installed, but broken
            raise
        raise ValueError(
            "the text encoder needs the package transformers, which is not installed; "
            f"run: {sys.executable} -m pip install -e .[text]"
        ) from None
    return transformers


class TextEncoder(nn.Module):
    """CLIP's causal transformer over the tokens of a prompt; the options are those of its published
    configuration.

    `tokenizer` is a folder with the vocabulary files; a relative path counts from the project."""

    def __init__(
        self,
        *,
        vocab_size: int = 49408,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        max_position_embeddings: int = 77,
        hidden_act: str = "quick_gelu",
        layer_norm_eps: float = 1e-5,
        tokenizer: Path | str = TOKENIZER,
    ) -> None:
        super().__init__()
        library = clip_library()
        config = library.CLIPTextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            max_position_embeddings=max_position_embeddings,
            hidden_act=hidden_act,
            layer_norm_eps=layer_norm_eps,
            bos_token_id=vocab_size - 2,
            eos_token_id=vocab_size - 1,
        )
        clip = library.CLIPTextModel(config)
        self.max_tokens = max_position_embeddings
        self.tokenizer_path = PROJECT / Path(tokenizer).expanduser()
        self.transformer = nn.Module()  # transformers 5 has no level text_model, the files have
        self.transformer.text_model = getattr(clip, "text_model", clip)
        # Files may list the positions 0, 1, 2, ... among the weights; `forward` counts them itself.
        embeddings = self.transformer.text_model.embeddings
        del embeddings.position_ids
        embeddings.register_load_state_dict_pre_hook(
            lambda _, state, prefix, *args: state.pop(f"{prefix}position_ids", None)
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, T) token numbers -> (N, T, D), the last layer's output after the final layer norm."""
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.transformer.text_model(ids, position_ids=positions).last_hidden_state

    @cached_property
    def tokenizer(self) -> Any:
        """CLIP's. Raises ValueError where its files are not there."""
        if not all((self.tokenizer_path / name).is_file() for name in VOCABULARY):
            raise ValueError(
                f"prompts need CLIP's tokenizer: put {' and '.join(VOCABULARY)} of "
                f"openai/clip-vit-large-patch14 into {self.tokenizer_path}"
            )
        tokenizer = clip_library().CLIPTokenizer
        return tokenizer.from_pretrained(self.tokenizer_path, local_files_only=True)

    def tokenize(self, prompts: Iterable[str]) -> torch.Tensor:
        """N strings -> (N, T) token numbers: begin, words (cut if long), end as often as fits."""
        fill = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        return self.tokenizer(list(prompts), **fill, return_tensors="pt").input_ids

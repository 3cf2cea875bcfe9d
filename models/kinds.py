"""What the weights in a file look like, by their names."""

import re
from collections.abc import Iterable, Sequence

SHOWN = 3  # names listed in a message before "and n more"

KINDS = {  # what a file seems to be: the first whose pattern begins a name in it
    "a quantized model of this project": r".*\.weight_codes$|.*weight_quantizer\.",
    "a Stable Diffusion checkpoint": r"cond_stage_model\.transformer\.",
    "a latent-diffusion checkpoint": r"model\.diffusion_model\.",
    "a classifier of guided diffusion": r"out\.\d\.(qkv_proj|positional_embedding)",
    "a U-Net of latent, improved or guided diffusion alone": r"input_blocks\.",
    "a pixel-space DDIM U-Net": r"temb\.dense\.",
    "a first stage (autoencoder) alone": r"(encoder|decoder)\.conv_in\.",
    "a network of the diffusers library (give its whole folder, with config.json)": (
        r"(down|mid|up)_blocks?\."
    ),
    "a text encoder": r"(transformer\.)?text_model\.",
    "an image classifier": r"(stem|layer1|features)\.|(fc|head|classifier)\.weight$",
}


def compare_kinds(state: Iterable[str], network: Iterable[str] = ()) -> str:
    """Says what a file with weights `state` seems to be, and what `network` does if another."""
    found, expected = _kind_of(state), _kind_of(network)
    if not found:
        return "the file is of no known kind"
    if found == expected:
        return f"both seem to be {found}"
    return f"the file seems to be {found}" + (f" and the network {expected}" if expected else "")


def _kind_of(names):
    names = list(names)
    kinds = (kind for kind, begin in KINDS.items() if any(re.match(begin, name) for name in names))
    return next(kinds, "")


def abridge(names: Sequence[str]) -> str:
    """Counts names and lists the first: '5 (a, b, c, ...)'."""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''})"

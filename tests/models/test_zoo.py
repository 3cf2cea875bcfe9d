"""Networks by family name, with every mistake named."""

import pytest
from conftest import TINY

from ddim.unet import UNet
from models.zoo import build_network


def test_builds_the_network():
    net = build_network(**TINY)
    assert isinstance(net, UNet) and net.ch == 8 and net.image_size == 8


@pytest.mark.parametrize(
    "options, sentence",
    [
        (
            {**TINY, "family": "ddim-unett"},
            "network family 'ddim-unett' is unknown; did you mean 'ddim-unet'?",
        ),
        (
            {**TINY, "ch_mul": [1]},
            "network family 'ddim-unet' has no option 'ch_mul'; did you mean 'ch_mult'?",
        ),
        ({"family": "ddim-unet"}, "network family 'ddim-unet' needs image_size in the model YAML"),
    ],
)
def test_mistakes(options, sentence):
    with pytest.raises(ValueError) as error:
        build_network(**options)
    assert str(error.value) == sentence

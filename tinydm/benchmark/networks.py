"""A network of a model YAML with random weights, in full precision and quantized: how fast it runs
does not depend on what it has learned."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ddim.schedule import make_schedule
from models.diffusion import DiffusionModel, example_arguments
from models.zoo import build_network
from quant.checkpoint import packed_bytes
from quant.convert import convert
from quant.network import QuantizedNet, fit, harden, observing
from tinydm.names import find_yaml
from tinydm.recipe import RunConfig, load_recipe

METHOD = "minmax"
FITTED_ON = 2  # samples
EIGHT = {"bits": 8, "symmetric": True}  # integers of -128 to 127, which a byte holds
ENDS = {"role": ["stem", "out"], "weight": EIGHT}
SIZES = {"W8": "w8a8", "W4": "w4a8"}


class Network:
    """`net` and its quantized forms, all on one device; `made` holds what variants make of them and
    share between batches."""

    def __init__(self, name: str, device: torch.device):
        self.file = find_yaml(name, ["model"])
        self.config = recipe_of(self.file, "w8a8")
        self.name = self.config.name
        self.net = random_network(self.config.network).to(device)
        self.made: dict[Any, nn.Module] = {}
        self.folder = TemporaryDirectory()  # gone with this object

    def keep(self, key: Any, make: Callable[[], nn.Module]) -> nn.Module:
        """What `make` gives, made once."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def written(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file that `write` writes, made once."""
        path = Path(self.folder.name, name, "network.onnx")
        if not path.exists():
            path.parent.mkdir()
            write(path)
        return path

    def arguments(self, batch: int) -> tuple[torch.Tensor, ...]:
        """Noise x (batch, C, H, W), times t (batch,) and, of a conditional network, conditions."""
        device = next(self.net.parameters()).device
        x, t, *cond = example_arguments(asdict(self.config), self.net)
        rng = torch.Generator().manual_seed(0)
        x, t = torch.randn(batch, *x.shape[1:], generator=rng), torch.full((batch,), 500.0)
        cond = [one.expand(batch, *one.shape[1:]).contiguous() for one in cond]
        return tuple(part.to(device) for part in (x, t, *cond))

    def quantized(self, bits: str) -> QuantizedNet:
        """The hardened network at widths of configs/bits."""
        return self.keep(bits, lambda: self._quantize(bits))

    @torch.no_grad()
    def _quantize(self, bits):
        net = convert(self.net, rules_of(self.file, bits))
        with observing(net, FITTED_ON):
            net(*self.arguments(FITTED_ON))
        fit(net)
        harden(net)
        return net

    def bytes(self) -> dict[str, int]:
        """Of the tensors of its file: fp32, and with weights of 8 and 4 bits."""
        found = {"fp32": sum(p.nbytes for p in self.net.parameters())}
        for word, bits in SIZES.items():
            found[word] = packed_bytes(convert(self.net, rules_of(self.file, bits)))
        return found

    def model(self) -> DiffusionModel:
        """The network with its schedule, to sample from; without a first stage."""
        shape = (self.net.in_channels, self.net.image_size, self.net.image_size)
        return DiffusionModel(self.name, self.net, make_schedule(**self.config.schedule), shape, "")


def random_network(options: dict[str, Any]) -> nn.Module:
    """The network of a model YAML with the same random weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_network(**options).eval().requires_grad_(False)


def recipe_of(file: str, bits: str) -> RunConfig:
    """The recipe of a model YAML at widths of configs/bits. Raises ValueError for no model."""
    files = [file, find_yaml(bits, ["bits"]), find_yaml(METHOD, ["method"])]
    config = load_recipe(files)
    if not config.network:
        raise ValueError(f"{file} describes no network; name a configs/model/*.yaml")
    return config


def rules_of(file: str, bits: str) -> list[dict[str, Any]]:
    """The rules of METHOD, but 8 bits for the weights of the first and last layer; weights of 8
    bits are symmetric."""
    config = recipe_of(file, bits)
    whole = [{"kind": "layer", "weight": EIGHT}] if config.bits.weight == 8 else []
    return [*config.all_rules, *whole, ENDS]

"""A pretrained diffusion model as all other code sees it, built from a model YAML.

Axes: N images, C channels, H x W pixels."""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from base.errors import unknown_word
from base.files import PROJECT
from base.seeds import SeededNoise
from ddim.schedule import Schedule, make_schedule
from models.condition import Condition, build_condition
from models.sampling import Sampling, sample
from models.weights import load_components, state_hash
from models.zoo import build_network

# component -> YAML key
PARTS = {"unet": "network", "first_stage": "first_stage", "cond_stage": "cond_stage"}
Rows = torch.Tensor | None  # the condition of each image (N, ...)
DECODED_AT_ONCE = 8  # latents
# where scripts/download_models.sh puts files, below the project
DOWNLOADED = Path("models/checkpoints")


@dataclass
class DiffusionModel:
    """A network with its schedule and what surrounds it. All modules are in evaluation mode and
    take no gradients; `shape` is (C, H, W) of x: pixels, or latents where there is a `first_stage`.
    `sampling` says how its images are drawn unless told otherwise."""

    name: str
    net: nn.Module
    schedule: Schedule
    shape: tuple
    weights_hash: str  # SHA-256 of names and weights as loaded
    first_stage: nn.Module | None = None  # decodes latents
    scale_factor: float = 1.0  # latents of the network = scale_factor * latents of the first stage
    condition: Condition | None = None
    guidance: float = 1.0  # scale of classifier-free guidance; 1 = none
    sampling: Sampling = field(default_factory=Sampling)

    def sample(self, indices: Iterable[int], **changes: Any) -> torch.Tensor:
        """Draws the images number `indices` by the model's own sampling, with changes such as
        `seed=1` or `steps=20` on top; returns them as (N, 3, H, W) uint8. Raises ValueError for an
        unknown key, and for classes or prompts, which are chosen when a model is loaded."""
        for key in changes.keys() - vars(self.sampling).keys():
            raise ValueError(unknown_word(f"sampling has no '{key}'", key, vars(self.sampling)))
        if {"classes", "prompts"} & changes.keys():
            raise ValueError(
                "classes and prompts belong to a loaded model; load it again with sampling.classes "
                "or sampling.prompts"
            )
        return sample(self, indices, replace(self.sampling, **changes))

    def eps(self, x: torch.Tensor, t: torch.Tensor, cond: Rows = None) -> torch.Tensor:
        """Predicts the noise in x (N, C, H, W) at the times t (N,) under the condition that
        `labels` gave: C channels, or 2C from a network that also predicts its variance. A quantized
        network's correction is applied. Classifier-free guidance (Ho & Salimans 2022,
        arXiv:2207.12598): e = e_null + guidance * (e_cond - e_null)."""
        out = self.net(*self.network_inputs(x, t, cond))
        if self.is_guided:
            null, asked = out.chunk(2)
            out = null + self.guidance * (asked - null)
        return out if self.correction is None else self.correction.eps(out, t)

    def network_inputs(
        self, x: torch.Tensor, t: torch.Tensor, cond: Rows = None
    ) -> tuple[torch.Tensor, ...]:
        """Returns what the network is called with for eps(x, t, cond): (x, t[, cond]); with
        guidance both halves in one batch of 2N, the null condition first."""
        if cond is None:
            return x, t
        if not self.is_guided:
            return x, t, cond
        null = self.null_label().expand_as(cond)
        return torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, cond])

    @property
    def is_guided(self) -> bool:
        return self.guidance != 1

    def null_label(self) -> torch.Tensor | None:
        """The condition (1, ...) that guidance leads away from; None without guidance."""
        return self.condition.null_row() if self.is_guided else None

    @property
    def correction(self) -> nn.Module | None:
        """The correction of eps that a quantized network brings; None without one."""
        return getattr(self.net, "correction", None)

    def with_net(self, net: nn.Module) -> "DiffusionModel":
        """The same model around another network, for example a quantized one."""
        return replace(self, net=net)

    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Makes images (N, 3, H, W) uint8 of x_0. Latents go through the first stage a few at a
        time: its activations are far larger than those of the network."""
        if self.first_stage is not None:
            parts = x.split(DECODED_AT_ONCE)
            x = torch.cat([self.first_stage.decode(part / self.scale_factor) for part in parts])
        return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def noise(self, seed: int, indices: Iterable[int]) -> SeededNoise:
        """One stream of noise per image, fixed by (seed, index)."""
        return SeededNoise(seed, indices, self.shape, self.device)

    def labels(self, seed: int, indices: Iterable[int]) -> torch.Tensor | None:
        """The condition of each image (N, ...), fixed by (seed, index); None if unconditional."""
        return None if self.condition is None else self.condition.rows(seed, indices)

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def float_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.net.parameters())


def load_model(config: dict[str, Any], *, device: torch.device | str) -> DiffusionModel:
    """Builds the model of a YAML's content on `device`: a dict with name, network, checkpoint,
    schedule, and where it has them weights, sampling, guidance and, of latent models, first_stage,
    cond_stage and scale_factor. Raises ValueError where the checkpoint does not fit."""
    modules = {part: build_network(**config[key]) for part, key in PARTS.items() if config.get(key)}
    path, weights = find_checkpoint(config), config.get("weights") or "ema"
    scale_factor = load_components(path, modules, weights=weights)
    for module in modules.values():
        module.eval().requires_grad_(False).to(device)
    net = modules["unet"]
    guidance, sampling = config.get("guidance") or {}, config.get("sampling") or {}
    condition = build_condition(net, modules.get("cond_stage"), sampling, guidance)
    scale = guidance.get("scale", 1.0)
    if scale != 1 and (condition is None or condition.null is None):
        raise ValueError(
            f"guidance.scale is {scale}, but {config['name']} has no null condition to be guided "
            "away from; set guidance.scale=1"
        )
    return DiffusionModel(
        name=config["name"],
        net=net,
        schedule=make_schedule(**config["schedule"]),
        shape=(net.in_channels, net.image_size, net.image_size),
        weights_hash=state_hash(*modules.values()),
        first_stage=modules.get("first_stage"),
        scale_factor=config.get("scale_factor") or scale_factor or 1.0,
        condition=condition,
        guidance=scale,
        sampling=Sampling(**sampling),
    )


def example_arguments(config: dict[str, Any], net: nn.Module) -> tuple[torch.Tensor, ...]:
    """Makes arguments of `net` for one sample, all zero, by the model YAML alone."""
    x, t = torch.zeros(1, net.in_channels, net.image_size, net.image_size), torch.zeros(1)
    if getattr(net, "context_dim", None):
        stage = config["cond_stage"]
        tokens = stage.get("max_position_embeddings", 77) if stage["family"] == "clip-text" else 1
        return x, t, torch.zeros(1, tokens, net.context_dim)
    if getattr(net, "num_classes", None) is None:
        return x, t
    return x, t, torch.zeros(1, dtype=torch.long)


def find_checkpoint(config: dict[str, Any]) -> Path:
    """Finds a model's checkpoint. A relative path counts from the project, then from the current
    folder; one below models/checkpoints is also looked for in the same place below the user's
    cache, where the authors' own code keeps it. Raises ValueError that says how to get it."""
    path = Path(config["checkpoint"]).expanduser()
    places = list(dict.fromkeys([PROJECT / path, path.absolute()]))
    if path.is_relative_to(DOWNLOADED):
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        places.append(cache / path.relative_to(DOWNLOADED))
    for place in places:
        if place.exists():  # a file, or a folder of the diffusers library
            return place
    hint = f"get it with '{config['download']}', or " if config.get("download") else ""
    demo = "; without it, the same pipeline runs on a model that ships: "
    demo = demo + config["demo"] if config.get("demo") else ""
    raise ValueError(
        f"the checkpoint of {config['name']} is not at {' or '.join(map(str, places))}; {hint}"
        f"say where it is with checkpoint=PATH{demo}"
    )

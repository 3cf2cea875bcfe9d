"""Ties the fixtures' checker to the library: builds the networks of a fixture's configuration or of
a public checkpoint, runs them, and loads whole checkpoints; schedules and samplers are in
fixture_adapter_samplers.py."""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch

from base.config import read_yaml
from models.checkpoint_files import PREFIXES
from models.diffusion import PARTS
from models.weights import load_components
from models.zoo import build_network

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

MODELS = Path(__file__).resolve().parents[1] / "configs/model"
LISTINGS = {  # public checkpoint -> model YAML
    "ddim-cifar10": "cifar10",
    "ddim-lsun-bedroom-256": "ddim-lsun-bedroom",
    "ddim-lsun-church-256": "ddim-lsun-church",
    "ddim-celeba-64": "ddim-celeba",
    "ldm-lsun-bedroom-256": "bedroom",
    "ldm-lsun-church-256": "church",
    "ldm-imagenet-256-cin-v2": "imagenet",
    "ldm-ffhq-256": "ffhq",
    "ldm-celeba-256": "celeba",
    "stable-diffusion-v1-4": "sd-v1-4",
    "improved-imagenet64-uncond": "imagenet64",
    "improved-imagenet64-cond": "imagenet64-cond",
    "improved-cifar10-uncond": "improved-cifar10",
    "improved-lsun-bedroom-256": "improved-lsun-bedroom",
    "guided-imagenet64-cond": "guided-imagenet64",
    "guided-imagenet128-cond": "guided-imagenet128",
    "guided-imagenet256-cond": "guided-imagenet256",
    "guided-imagenet256-uncond": "guided-imagenet256-uncond",
    "guided-imagenet512-cond": "guided-imagenet512",
}
# a model that has this first stage
FIRST_STAGES = {"first-stage-vq-f4": "bedroom", "first-stage-kl-f8": "sd-v1-4"}
# names with prefixes
LATENT = ("bedroom", "church", "imagenet", "ffhq", "celeba", "sd-v1-4")


def make(family, config):
    """The networks of a fixture file, by component."""
    if family == "ddim-unet":
        options = {k: v for k, v in config["model"].items() if k != "type"}
        return {
            "unet": build_network("ddim-unet", image_size=config["data"]["image_size"], **options)
        }
    if family == "clip-text":
        return {"text": TextAlone(build_network("clip-text", **config["text"]))}
    if family.startswith("autoencoder"):
        return {
            "first_stage": build_network(
                family, **without(config["first_stage"], "kind", "lossconfig", "monitor")
            )
        }
    parts = {"unet": build_network(family, **config["unet"])}
    if "cond_stage" in config:
        parts["cond_stage"] = build_network(
            "class-embedder", **without(config["cond_stage"], "kind", "key")
        )
    return parts


class TextAlone(torch.nn.Module):
    """The text encoder with names that begin at `text_model`, as the fixture has them."""

    def __init__(self, encoder):
        super().__init__()
        self.text_model, self.__dict__["encoder"] = encoder.transformer.text_model, encoder

    def forward(self, ids):
        return self.encoder(ids)


def without(options, *names):
    return {key: value for key, value in options.items() if key not in names}


def run(family, modules, config, inputs):
    given = {name.removeprefix("in/"): value for name, value in inputs.items()}
    if family == "clip-text":
        return {"out/last_hidden_state": modules["text"](given["ids"])}
    if family == "autoencoder-kl":
        return run_kl(modules["first_stage"], config["scale_factor"], given)
    if family == "autoencoder-vq":
        return run_vq(modules["first_stage"], config["scale_factor"], given)
    cond, outputs = given.get("context", given.get("y")), {}
    if "class" in given:
        cond = outputs["out/context"] = modules["cond_stage"](given["class"])
    answer = modules["unet"](*(a for a in (given["x"], given["t"], cond) if a is not None))
    return outputs | {"out/eps": answer, "out/model": answer}


def run_kl(net, scale_factor, given):
    mean, logvar = net.moments(given["image"])
    return {
        "out/moments": net.quant_conv(net.encoder(given["image"])),
        "out/mean": mean,
        "out/logvar": logvar,
        "out/std": (logvar / 2).exp(),
        "out/z_mode_scaled": scale_factor * net.encode(given["image"]),
        "out/z_sample_scaled": scale_factor * net.encode(given["image"], given["noise"]),
        "out/image": net.decode(given["z"] / scale_factor),
    }


def run_vq(net, scale_factor, given):
    z = given["z"] / scale_factor
    prequant, (quantized, indices) = net.encode(given["image"]), net.nearest(z)
    return {
        "out/prequant": prequant,
        "out/prequant_scaled": scale_factor * prequant,
        "out/indices": indices,
        "out/quantized": quantized,
        "out/image": net.decode(z),
        "out/image_not_quantized": net.decode(z, quantize=False),
    }


def run_checkpoint(config, state_dict, inputs):
    """A whole latent-diffusion checkpoint, by way of a file, with the raw and the averaged
    weights."""
    params, outputs = config["model"]["params"], {}
    first_stage = params["first_stage_config"]
    kind = "autoencoder-vq" if "VQ" in first_stage["target"] else "autoencoder-kl"
    modules = {
        "unet": build_network("ldm-unet", **params["unet_config"]["params"]),
        "first_stage": build_network(
            kind, **without(first_stage["params"], "lossconfig", "monitor")
        ),
    }
    if "ClassEmbedder" in str(params.get("cond_stage_config")):
        modules["cond_stage"] = build_network(
            "class-embedder", **without(params["cond_stage_config"]["params"], "key")
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.ckpt"
        torch.save({"state_dict": state_dict, "global_step": 0}, path)
        for weights in ("raw", "ema"):
            scale_factor = load_components(path, modules, weights=weights)
            for module in modules.values():
                module.eval()
            cond = ()
            if "cond_stage" in modules:
                cond = (modules["cond_stage"](inputs["in/class"]),)
                outputs["out/context"] = cond[0]
            outputs[f"out/eps_{weights}"] = modules["unet"](inputs["in/x"], inputs["in/t"], *cond)
    outputs["out/image"] = modules["first_stage"].decode(
        inputs["in/z"] / (scale_factor or params.get("scale_factor", 1))
    )
    return outputs


def published(listing):
    """The networks of a public checkpoint on the meta device, by state-dict prefix."""
    with torch.device("meta"):
        if listing in FIRST_STAGES:
            return {
                "": build_network(
                    **read_yaml(MODELS / f"{FIRST_STAGES[listing]}.yaml")["first_stage"]
                )
            }
        config = read_yaml(MODELS / f"{LISTINGS[listing]}.yaml")
        parts = {
            part: build_network(**config[key])
            for part, key in PARTS.items()
            if config.get(key)
            and (config[key]["family"] != "clip-text" or find_spec("transformers"))
        }
    if LISTINGS[listing] not in LATENT:
        return {"": parts["unet"]}
    return {PREFIXES[part]: module for part, module in parts.items()}


def full_run(output, modules, inputs):
    """One output of a full-size network."""
    what = output.rpartition("/")[2]
    if output.startswith("first_stage"):
        net = modules[PREFIXES["first_stage"]]
        if what == "image":
            z = (
                inputs["z"]
                if "z" in inputs
                else net.quantize.embedding(inputs["codes"]).movedim(-1, 1)
            )
            return net.decode(z) if "z" in inputs else net.decode(z, quantize=False)
        return (
            net.quant_conv(net.encoder(inputs["image"]))
            if what == "moments"
            else net.encode(inputs["image"])
        )
    if output.startswith("clip_text"):
        return modules[PREFIXES["cond_stage"]](inputs["ids"])
    net, cond = (
        modules.get("", modules.get(PREFIXES["unet"])),
        inputs.get("context", inputs.get("y")),
    )
    if "class" in inputs:
        cond = modules[PREFIXES["cond_stage"]](inputs["class"])
    return net(*(a for a in (inputs["x"], inputs["t"], cond) if a is not None))

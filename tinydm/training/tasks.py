"""The trainings of the models that ship: each fills its folder and returns a sentence about it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from base.config import read_yaml
from base.files import write_atomically, write_text
from evaluation.extractors.classifier import build_classifier
from models.checkpoint_files import load_state
from models.data import load_images
from models.weights import load_components, load_weights
from models.zoo import build_network
from tinydm.training.classifier import ClassifierTraining
from tinydm.training.config import TrainConfig
from tinydm.training.diffusion import DiffusionTraining
from tinydm.training.first_stage import FirstStageTraining, encode_images
from tinydm.training.loop import Batch, Training, fit


def train_first_stage(config: TrainConfig) -> str:
    """Trains the autoencoder of a latent model."""
    data = load_images(config.data)
    return _train_and_ship(FirstStageTraining(read_yaml(config.model), config, data[0]), data)


def train_diffusion(config: TrainConfig) -> str:
    """Trains a diffusion model. Raises ValueError for a latent one without a first stage."""
    model_config, (images, labels) = read_yaml(config.model), load_images(config.data)
    first_stage, scale_factor = None, 1.0
    if model_config.get("first_stage"):
        if not config.first_stage:
            raise ValueError(
                f"{config.model} is a latent model; train its first stage before "
                "(task=first_stage) and name the weights with first_stage=FILE"
            )
        first_stage = build_network(**model_config["first_stage"]).eval().requires_grad_(False)
        load_components(config.first_stage, {"first_stage": first_stage})
        images, scale_factor = encode_images(first_stage, images)
    module = DiffusionTraining(model_config, config, first_stage, scale_factor)
    return _train_and_ship(module, (images, labels), "net.unet")


def train_classifier(config: TrainConfig) -> str:
    """Trains an image classifier."""
    module = ClassifierTraining(build_classifier(**config.classifier), config)
    return _train_and_ship(module, load_images(config.data))


def train_and_record(module: Training, data: Batch) -> dict[str, Any]:
    """Trains to the end of the recipe on images and labels; writes and returns record.json."""
    config, (images, labels) = module.config, data
    rows = fit(module, images, labels, config.out)
    last = [loss for _, loss in rows[-5:]]
    record = {
        "recipe": asdict(config),
        "images_seen": rows[-1][0],
        "training_images": len(images),
        "final_loss": round(sum(last) / len(last), 5),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    write_text(Path(config.out) / "record.json", json.dumps(record, indent=2) + "\n")
    return record


def _train_and_ship(module, data, part="net"):
    """Trains, then saves the averaged weights as fp16. Where the recipe names weights as `init`,
    this part of the module begins at them, and the average too."""
    config = module.config
    if config.init:
        load_weights(module.get_submodule(part), load_state(config.init), f"init={config.init}")
        module.ema.module.load_state_dict(module.net.state_dict())
    train_and_record(module, data)
    path = Path(config.out) / "weights.safetensors"
    weights = module.weights()
    for name, value in weights.items():
        if value.is_floating_point() and value.dim():
            weights[name] = value.half().contiguous()
    write_atomically(path, lambda part: save_file(weights, part))
    return f"averaged weights (fp16) in {path}, record in {path.with_name('record.json')}"

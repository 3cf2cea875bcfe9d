"""Train a model that ships with the project:

    python scripts/train.py configs/train/RECIPE.yaml out=FOLDER data=FOLDER [key=value ...]

Started again with the same folder it goes on from the last checkpoint.
"""
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from evaluation.classifier import build_classifier  # noqa: E402
from models.data import load_images  # noqa: E402
from models.tasks import ClassifierTraining, DiffusionTraining, FirstStageTraining, encode_images  # noqa: E402
from models.training import fit  # noqa: E402
from models.weights import load_components, load_state, load_weights  # noqa: E402
from models.zoo import build_network  # noqa: E402
from quant.config import load, read_yaml, unknown_word  # noqa: E402
from scripts.cli import main  # noqa: E402


@dataclass
class TrainConfig:
    """A recipe. Counts are images and optimizer steps; `data` as in models.data.load_images."""
    task: str = "diffusion"                  # first_stage | diffusion | classifier
    model: str = ""                          # model YAML of what is trained
    first_stage: str = ""                    # weights of the first stage, for the diffusion of a latent model
    classifier: dict = field(default_factory=dict)
    init: str = ""                           # weights to start from instead of random ones, e.g. the shipped file
    data: str = "cifar10"
    out: str = ""
    num_images: int = 1_000_000
    batch_size: int = 64
    steps_per_epoch: int = 200               # optimizer steps between checkpoints
    lr: float = 1e-3
    beta2: float = 0.99                      # of Adam (diffusion)
    weight_decay: float = 0.0                # of SGD (classifier)
    warmup_steps: int = 500
    grad_clip: float = 1.0                   # norm of the gradient
    ema_decay: float = 0.999
    precision: str = "bf16-mixed"
    compile: bool = False
    sample_every: int = 10                   # epochs between loss curves and sample grids
    seed: int = 0
    device: str = "auto"
    threads: int = 0                         # CPU threads; 0 = PyTorch's choice


def first_stage(config, images):
    return initialised(FirstStageTraining(read_yaml(config.model), config, images), "net", config), images


def diffusion(config, images):
    facts = read_yaml(config.model)
    if not facts.get("first_stage"):
        return initialised(DiffusionTraining(facts, config), "net.unet", config), images
    if not config.first_stage:
        raise ValueError(f"{config.model} is a latent model; train its first stage before (task=first_stage) and name "
                         "the weights with first_stage=FILE")
    autoencoder = build_network(**facts["first_stage"]).eval().requires_grad_(False)
    load_components(config.first_stage, {"first_stage": autoencoder})
    latents, scale_factor = encode_images(autoencoder, images)
    return initialised(DiffusionTraining(facts, config, autoencoder, scale_factor), "net.unet", config), latents


def classifier(config, images):
    return initialised(ClassifierTraining(build_classifier(**config.classifier), config), "net", config), images


TASKS = {"first_stage": first_stage, "diffusion": diffusion, "classifier": classifier}


def initialised(module, part, config):
    """The module, begun with the weights `init` instead of random ones where the recipe says so."""
    if config.init:
        load_weights(module.get_submodule(part), load_state(config.init), f"init={config.init}")
        module.ema.module.load_state_dict(module.net.state_dict())
    return module


def run(arguments):
    files = [a for a in arguments if "=" not in a]
    config = load(TrainConfig, files, [a for a in arguments if "=" in a])
    if not config.out:
        raise ValueError("say where the run lives: out=FOLDER")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    if config.task not in TASKS:
        raise ValueError(unknown_word(f"task '{config.task}' is unknown", config.task, TASKS))
    images, labels = load_images(config.data, "train")
    module, images = TASKS[config.task](config, images)
    rows = fit(module, images, labels, config.out)
    record = {"recipe": asdict(config), "images_seen": rows[-1][0], "training_images": len(images),
              "final_loss": round(sum(loss for _, loss in rows[-5:]) / len(rows[-5:]), 5),
              "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    out = Path(config.out)
    weights = {name: value.half().contiguous() if value.is_floating_point() and value.dim() else value
               for name, value in module.weights().items()}
    save_file(weights, out / "weights.safetensors")
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"averaged weights (fp16) in {out / 'weights.safetensors'}, record in {out / 'record.json'}")


if __name__ == "__main__":
    main(run)

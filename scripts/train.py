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
from models.training import ClassifierTraining, DiffusionTraining, fit  # noqa: E402
from models.weights import load_state, load_weights  # noqa: E402
from quant.config import load, read_yaml  # noqa: E402
from scripts.cli import main  # noqa: E402


@dataclass
class TrainConfig:
    """A recipe. Counts are images and optimizer steps; `data` as in models.data.load_images."""
    task: str = "diffusion"                  # diffusion | classifier
    model: str = ""                          # model YAML of a diffusion network
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


def run(arguments):
    files = [a for a in arguments if "=" not in a]
    config = load(TrainConfig, files, [a for a in arguments if "=" in a])
    if not config.out:
        raise ValueError("say where the run lives: out=FOLDER")
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    images, labels = load_images(config.data, "train")
    if config.task == "diffusion":
        module = DiffusionTraining(read_yaml(config.model), config)
    elif config.task == "classifier":
        module = ClassifierTraining(build_classifier(**config.classifier), config)
    else:
        raise ValueError(f"task '{config.task}' is unknown; choose diffusion or classifier")
    if config.init:
        load_weights(module.net, load_state(config.init), f"init={config.init}")
        module.ema.module.load_state_dict(module.net.state_dict())
    rows = fit(module, images, labels, config.out)
    record = {"recipe": asdict(config), "images_seen": rows[-1][0], "training_images": len(images),
              "final_loss": round(sum(loss for _, loss in rows[-5:]) / len(rows[-5:]), 5),
              "torch": torch.__version__,
              "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    out = Path(config.out)
    weights = {name: value.half().contiguous() if value.is_floating_point() else value
               for name, value in module.ema.module.state_dict().items()}
    save_file(weights, out / "weights.safetensors")
    (out / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"averaged weights (fp16) in {out / 'weights.safetensors'}, record in {out / 'record.json'}")


if __name__ == "__main__":
    main(run)

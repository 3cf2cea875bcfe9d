"""All keys of a training recipe."""

from dataclasses import dataclass, field
from typing import Any

from tinydm.recipe import Bits


@dataclass
class TrainConfig:
    """A recipe of training. Counts are images and steps; `data`: see models.data.load_images."""

    task: str = "diffusion"  # first_stage | diffusion | classifier | qat
    model: str = ""  # model YAML of what is trained
    first_stage: str = ""  # weights of the first stage, for the diffusion of a latent model
    classifier: dict[str, Any] = field(default_factory=dict)  # options of the network
    rules: str = ""  # of qat: the method YAML whose rules say what is quantized
    bits: Bits = field(default_factory=Bits)  # of qat: widths that those rules refer to
    dynamic: bool = False  # of qat: scales of activations are functions of time (TDQ); else LSQ
    checkpoint: str = ""  # of qat: weights to start from, in place of those of the model YAML
    init: str = ""  # weights to start from instead of random ones, e.g. the shipped file
    data: str = "cifar10"  # a folder of images, or cifar10[:FOLDER]
    out: str = ""  # folder of the training, or run folder (qat)
    num_images: int = 1_000_000  # seen in all
    batch_size: int = 64  # images of a step
    steps_per_epoch: int = 200  # optimizer steps between checkpoints
    lr: float = 1e-3  # rate
    beta2: float = 0.99  # of Adam (diffusion, qat)
    weight_decay: float = 0.0  # of SGD (classifier), of AdamW (qat)
    warmup_steps: int = 500  # in which the rate rises
    grad_clip: float = 1.0  # norm of the gradient; 0 = no limit
    ema_decay: float = 0.999  # of the moving average of the weights, a step
    precision: str = "bf16-mixed"  # as Lightning calls it
    compile: bool = False  # by torch.compile
    sample_every: int = 10  # epochs between loss curves and sample grids
    seed: int = 0  # of everything random
    device: str = "auto"  # auto | cpu | cuda[:N]
    threads: int = 0  # CPU threads; 0 = PyTorch's choice


# They do not change what is learned.
KEYS_WITHOUT_EFFECT = ("out", "device", "threads", "sample_every")

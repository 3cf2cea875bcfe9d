"""Train a model that ships with the project, or go on training a pretrained one as its quantized
self (TDQ, LSQ):

    python scripts/train.py configs/train/RECIPE.yaml out=FOLDER data=FOLDER [key=value ...]
    python scripts/train.py configs/train/qat-MODEL.yaml out=RUN data=FOLDER bits.weight=4 \\
        bits.input=4 dynamic=true

Started again with the same folder it goes on from the last checkpoint. A run folder of the second
kind is that of any method: scripts/sample.py, evaluate.py and report.py go on from it. It also
knows the flags of TDQ's released code: --base RECIPE, --n_bit_w BITS, --n_bit_a BITS, --use_dynamic
(dynamic=true), --ckpt FILE (checkpoint=FILE)."""

import torch

from base.config import load, split_arguments
from base.devices import exact_arithmetic
from base.errors import unknown_word
from tinydm.training.config import TrainConfig
from tinydm.training.qat import train_quantized
from tinydm.training.tasks import train_classifier, train_diffusion, train_first_stage

TASKS = {
    "first_stage": train_first_stage,
    "diffusion": train_diffusion,
    "classifier": train_classifier,
    "qat": train_quantized,
}
# of TDQ's released code -> what they stand for here
FLAGS = {
    "--base": "",
    "--n_bit_w": "bits.weight=",
    "--n_bit_a": "bits.input=",
    "--use_dynamic": "dynamic=true",
    "--ckpt": "checkpoint=",
}


def run(arguments: list[str]) -> None:
    """Trains by a command line."""
    files, words = split_arguments(replace_flags(arguments))
    config = load(TrainConfig, files, words)
    check(config, words)
    with exact_arithmetic(config.threads):
        torch.manual_seed(config.seed)
        print(TASKS[config.task](config))


def replace_flags(arguments: list[str]) -> list[str]:
    """Puts key=value in place of flags. Raises ValueError for unknown or incomplete ones."""
    words, rest = [], list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("-"):
            words.append(flag + equals + value)
            continue
        if flag not in FLAGS:
            raise ValueError(unknown_word(f"flag '{flag}' is unknown", flag, FLAGS))
        word = FLAGS[flag]
        if flag != "--use_dynamic":
            if not (value or rest):
                raise ValueError(f"flag '{flag}' needs a value")
            word += value or rest.pop(0)
        words.append(word)
    return words


def check(config: TrainConfig, words: list[str]) -> None:
    """Raises ValueError for what types alone do not catch, before any work begins; `words` are the
    key=value words of the command line."""
    if not config.out:
        raise ValueError("say where the run lives: out=FOLDER")
    if config.task not in TASKS:
        raise ValueError(unknown_word(f"task '{config.task}' is unknown", config.task, TASKS))
    of_qat = ("bits.", "dynamic=", "rules=", "checkpoint=")
    if config.task != "qat" and any(word.startswith(of_qat) for word in words):
        raise ValueError(
            "bits, dynamic, rules and checkpoint are of quantization-aware training, this recipe "
            f"is of task '{config.task}'; name one of configs/train/qat-*.yaml, or say init=FILE "
            "for weights to start from"
        )
    if config.task == "qat" and (config.init or config.first_stage):
        raise ValueError(
            "quantization-aware training starts from a whole pretrained model; name another one "
            "than that of the model YAML with checkpoint=FILE, not with init or first_stage"
        )
    if config.num_images < config.batch_size:
        raise ValueError(
            f"num_images={config.num_images} is not even one batch of {config.batch_size}; train "
            "on more"
        )

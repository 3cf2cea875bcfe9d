"""Train a model that ships with the project, or go on training a pretrained one as its quantized
self (TDQ, LSQ):

    python scripts/train.py configs/train/RECIPE.yaml out=FOLDER data=FOLDER [key=value ...] python
    scripts/train.py configs/train/qat-MODEL.yaml out=RUN data=FOLDER bits.weight=4 bits.input=4
    dynamic=true

Started again with the same folder it goes on from the last checkpoint. A run folder of the second
kind is that of any method: scripts/sample.py, evaluate.py and report.py go on from it. It also
knows the flags of TDQ's released code: --base RECIPE, --n_bit_w BITS, --n_bit_a BITS, --use_dynamic
(dynamic=true), --ckpt FILE (checkpoint=FILE)."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from base.config import load, read_yaml, split_arguments
from base.errors import unknown_word
from base.files import save_tensors, write_text
from evaluation.extractors.classifier import build_classifier
from models.data import load_images
from models.diffusion import example_arguments
from models.weights import load_components, load_state, load_weights
from models.zoo import build_network
from quant.checkpoint import save_quantized
from quant.graph import trace
from quant.qat import finish
from quant.timeline import PER_STEP
from tinydm.recipe import Bits, Calibration, RunConfig, check, differences, network_times
from tinydm.run_folder import Run, provenance, write_config
from tinydm.stages.quantize import write_map
from tinydm.training.loop import fit
from tinydm.training.tasks import (
    ClassifierTraining,
    DiffusionTraining,
    FirstStageTraining,
    QuantizedTraining,
    encode_images,
)


@dataclass
class TrainConfig:
    """A recipe. Counts are images and optimizer steps; `data` as in models.data.load_images."""

    task: str = "diffusion"  # first_stage | diffusion | classifier | qat
    model: str = ""  # model YAML of what is trained
    # weights of the first stage, for the diffusion of a latent model
    first_stage: str = ""
    classifier: dict = field(default_factory=dict)
    # of qat: the method YAML whose rules say what is quantized
    rules: str = ""
    bits: Bits = field(default_factory=Bits)  # of qat: widths that those rules refer to
    # of qat: scales of activations are functions of time (TDQ); else LSQ
    dynamic: bool = False
    # of qat: weights to start from, in place of those of the model YAML
    checkpoint: str = ""
    # weights to start from instead of random ones, e.g. the shipped file
    init: str = ""
    data: str = "cifar10"
    out: str = ""
    num_images: int = 1_000_000
    batch_size: int = 64
    steps_per_epoch: int = 200  # optimizer steps between checkpoints
    lr: float = 1e-3
    beta2: float = 0.99  # of Adam (diffusion, qat)
    weight_decay: float = 0.0  # of SGD (classifier), of AdamW (qat)
    warmup_steps: int = 500
    grad_clip: float = 1.0  # norm of the gradient; 0 = no limit
    ema_decay: float = 0.999
    precision: str = "bf16-mixed"
    compile: bool = False
    sample_every: int = 10  # epochs between loss curves and sample grids
    seed: int = 0
    device: str = "auto"
    threads: int = 0  # CPU threads; 0 = PyTorch's choice


# keys that do not change what is learned
ELSEWHERE = ("out", "device", "threads", "sample_every")


def first_stage(config):
    images, labels = load_images(config.data)
    module = FirstStageTraining(read_yaml(config.model), config, images)
    ship(config, initialised(module, "net", config), images, labels)


def diffusion(config):
    facts, (images, labels) = read_yaml(config.model), load_images(config.data)
    if not facts.get("first_stage"):
        return ship(
            config,
            initialised(DiffusionTraining(facts, config), "net.unet", config),
            images,
            labels,
        )
    if not config.first_stage:
        raise ValueError(
            f"{config.model} is a latent model; train its first stage before (task=first_stage) "
            "and name "
            "the weights with first_stage=FILE"
        )
    autoencoder = build_network(**facts["first_stage"]).eval().requires_grad_(False)
    load_components(config.first_stage, {"first_stage": autoencoder})
    latents, scale_factor = encode_images(autoencoder, images)
    module = DiffusionTraining(facts, config, autoencoder, scale_factor)
    ship(config, initialised(module, "net.unet", config), latents, labels)


def classifier(config):
    images, labels = load_images(config.data)
    module = ClassifierTraining(build_classifier(**config.classifier), config)
    ship(config, initialised(module, "net", config), images, labels)


def qat(config):
    """Fills a run folder. Raises ValueError for a folder of another recipe, and for models and data
    that do not fit."""
    run, facts = open_folder(config), read_yaml(config.model)
    num_classes = (facts.get("cond_stage") or {}).get("n_classes") or facts["network"].get(
        "num_classes"
    )
    if run.model.schedule.variance == "learned" or (
        run.model.condition is not None and not num_classes
    ):
        raise ValueError(
            f"{config.model} answers its variance too, or is asked by prompts; only networks that "
            "answer "
            "eps alone, without a condition or by classes, can be trained here"
        )
    if any(rule.get("weight", {}).get("per_segment") for rule in run.config.all_rules):
        raise ValueError(
            f"the rules of {config.rules} give every time segment its own weights; training "
            "learns one "
            "network, name another method's rules"
        )
    autoencoder, size = run.model.first_stage, run.model.shape[-1]
    images, labels = load_images(
        config.data, size=size * (autoencoder.downsampling if autoencoder else 1)
    )
    if num_classes and int(labels.max()) >= num_classes:
        raise ValueError(
            f"{config.data} has {int(labels.max()) + 1} class folders, {config.model} knows "
            f"{num_classes} "
            "classes; give the images it was trained on"
        )
    if autoencoder:
        images = encode_images(autoencoder, images, scale_factor=run.model.scale_factor)[0]
    rows = torch.randperm(len(images))[: config.batch_size]
    batch = images[rows], labels[rows]
    module = QuantizedTraining(
        facts, config, run.model, run.config.all_rules, config.dynamic, batch
    )
    with run.stage("quantize"):
        record = learn(config, module, images, labels)
        fact = {"pass": "qat", "images": record["images_seen"], "loss": record["final_loss"]}
        write_text(run.path("passes.jsonl"), json.dumps(fact) + "\n")
        net, functions = finish(module.model().net, network_times(run.config))
        # whose network is as it was: the other one has learned
        original = open_folder(config)
        graph = trace(original.model.net, example_arguments(asdict(run.config), original.model.net))
        print(write_map(original, net, graph))
        if functions:
            save_tensors(run.path("dynamic.safetensors"), functions, {})
        save_quantized(
            run.path("quantized.safetensors"), net, run.recipe() | {"rules": run.config.all_rules}
        )
    print(
        f"averaged network, quantized, in {run.path('quantized.safetensors')}; go on with: python "
        "scripts/sample.py "
        f"{run.folder}"
    )


TASKS = {"first_stage": first_stage, "diffusion": diffusion, "classifier": classifier, "qat": qat}


def initialised(module, part, config):
    """The module, begun with the weights `init` instead of random ones where the recipe says so."""
    if config.init:
        load_weights(module.get_submodule(part), load_state(config.init), f"init={config.init}")
        module.ema.module.load_state_dict(module.net.state_dict())
    return module


def learn(config, module, images, labels):
    """Train to the end of the recipe; writes and returns the record of it."""
    rows = fit(module, images, labels, config.out)
    record = {
        "recipe": asdict(config),
        "images_seen": rows[-1][0],
        "training_images": len(images),
        "final_loss": round(sum(loss for _, loss in rows[-5:]) / len(rows[-5:]), 5),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    (Path(config.out) / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def ship(config, module, images, labels):
    """Train, then save the averaged weights as fp16."""
    learn(config, module, images, labels)
    out = Path(config.out)
    weights = {
        name: value.half().contiguous() if value.is_floating_point() and value.dim() else value
        for name, value in module.weights().items()
    }
    save_file(weights, out / "weights.safetensors")
    print(
        f"averaged weights (fp16) in {out / 'weights.safetensors'}, record in {out / 'record.json'}"
    )


def open_folder(config):
    """The run folder of a recipe of qat, begun or as it is: its recipe is the model YAML with the
    rules and bits of the training. What sets trainings apart stands in the name of the preset."""
    words = [f"bits.{part}={bits}" for part, bits in asdict(config.bits).items()]
    own = load(RunConfig, [config.model, *([config.rules] if config.rules else [])], words)
    told = {key: value for key, value in asdict(config).items() if key not in ELSEWHERE}
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:8]
    own = replace(
        own,
        method="tdq-qat" if config.dynamic else "lsq-qat",
        segments=PER_STEP if config.dynamic else 1,
        passes=[],
        calibration=Calibration(steps=1),
        checkpoint=config.checkpoint or own.checkpoint,
        preset=f"{config.num_images} images, batches of {config.batch_size}, lr {config.lr:g} "
        f"({digest})",
        seed=config.seed,
        out=config.out,
        device=config.device,
        threads=config.threads,
    )
    check(own)
    if not own.rules:
        raise ValueError(
            "nothing says what is quantized; give the method YAML whose rules do, for example "
            "rules=configs/method/tdq.yaml"
        )
    run, saved = Run(own), Path(config.out) / "config.yaml"
    if not saved.exists():
        own.provenance = provenance(run.model, [config.model, config.rules])
        write_config(run)
        return run
    before = load(RunConfig, [saved])
    changed = differences(before, own)
    if changed:
        raise ValueError(
            f"{config.out} belongs to another recipe: {'; '.join(changed[:3])}; choose another "
            "out= "
            "folder"
        )
    own.provenance = before.provenance
    return run


FLAGS = {
    "--base": "",
    "--n_bit_w": "bits.weight=",
    "--n_bit_a": "bits.input=",
    "--use_dynamic": "dynamic=true",
    "--ckpt": "checkpoint=",
}  # of TDQ's released code -> what they stand for here


def plain(arguments):
    """The command line with key=value words for flags. Raises ValueError for an unknown flag or one
    without value."""
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


def run(arguments):
    files, words = split_arguments(plain(arguments))
    config = load(TrainConfig, files, words)
    if not config.out:
        raise ValueError("say where the run lives: out=FOLDER")
    if config.task not in TASKS:
        raise ValueError(unknown_word(f"task '{config.task}' is unknown", config.task, TASKS))
    if config.task != "qat" and any(
        word.startswith(("bits.", "dynamic=", "rules=", "checkpoint=")) for word in words
    ):
        raise ValueError(
            "bits, dynamic, rules and checkpoint are of quantization-aware training, this recipe "
            "is of "
            f"task '{config.task}'; name one of configs/train/qat-*.yaml, or say init=FILE for "
            "weights to "
            "start from"
        )
    if config.task == "qat" and (config.init or config.first_stage):
        raise ValueError(
            "quantization-aware training starts from a whole pretrained model; name another one "
            "than that "
            "of the model YAML with checkpoint=FILE, not with init or first_stage"
        )
    if config.num_images < config.batch_size:
        raise ValueError(
            f"num_images={config.num_images} is not even one batch of {config.batch_size}; train "
            "on more"
        )
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    TASKS[config.task](config)

"""Quantization-aware training in a run folder like that of any method."""

import hashlib
import json
from dataclasses import asdict, replace

import torch

from base.config import load, read_yaml
from base.files import write_lines
from models.data import load_images
from quant.qat import finish
from quant.timeline import PER_STEP
from tinydm.recipe import Calibration, RunConfig, check, network_times
from tinydm.run_folder import Run, provenance, reopen, write_config
from tinydm.stages.quantize import log_line, save, write_map
from tinydm.training.config import KEYS_WITHOUT_EFFECT, TrainConfig
from tinydm.training.first_stage import encode_images
from tinydm.training.quantized import QuantizedTraining
from tinydm.training.tasks import train_and_record


def train_quantized(config: TrainConfig) -> str:
    """Fills a run folder; returns a sentence about it. Raises ValueError for what does not fit."""
    run, model_config = open_folder(config), read_yaml(config.model)
    num_classes = _count_classes(model_config, run.model, config)
    rules = run.config.all_rules
    if any(rule.get("weight", {}).get("per_segment") for rule in rules):
        raise ValueError(
            f"the rules of {config.rules} give every time segment its own weights; training "
            "learns one network, name another method's rules"
        )
    data = _load_batches(config, run.model, num_classes)
    rows = torch.randperm(len(data[0]))[: config.batch_size]
    batch = data[0][rows], data[1][rows]
    module = QuantizedTraining(model_config, config, run.model, rules, config.dynamic, batch)
    with run.stage("quantize"):
        record = train_and_record(module, data)
        row = {"pass": "qat", "images": record["images_seen"], "loss": record["final_loss"]}
        write_lines(run.path("passes.jsonl"), [row])
        net, functions = finish(module.model().net, network_times(run.config))
        original = open_folder(config)  # whose network is as it was: the other one has learned
        log_line(write_map(original, net))
        save(run, net, functions, rules)
    further = f"go on with: python scripts/sample.py {run.folder}"
    return f"averaged network, quantized, in {run.path('quantized.safetensors')}; {further}"


def _count_classes(model_config, model, config):
    """Of a model that takes classes. Raises ValueError for one that cannot be trained here."""
    cond_stage = model_config.get("cond_stage") or {}
    num_classes = cond_stage.get("n_classes") or model_config["network"].get("num_classes")
    asked_by_prompts = model.condition is not None and not num_classes
    if model.schedule.variance == "learned" or asked_by_prompts:
        raise ValueError(
            f"{config.model} answers its variance too, or is asked by prompts; only networks that "
            "answer eps alone, without a condition or by classes, can be trained here"
        )
    return num_classes


def _load_batches(config, model, num_classes):
    """Images or latents and their labels. Raises ValueError for classes that the model lacks."""
    first_stage = model.first_stage
    size = model.shape[-1] * (first_stage.downsampling if first_stage else 1)
    images, labels = load_images(config.data, size=size)
    found = int(labels.max()) + 1
    if num_classes and found > num_classes:
        raise ValueError(
            f"{config.data} has {found} class folders, {config.model} knows {num_classes} "
            "classes; give the images it was trained on"
        )
    if first_stage:
        images = encode_images(first_stage, images, scale_factor=model.scale_factor)[0]
    return images, labels


def open_folder(config: TrainConfig) -> Run:
    """Opens the run folder of a training, new or as it is: its recipe is the model YAML with the
    rules and bits of the training. What sets trainings apart stands in the name of the preset.
    Raises ValueError where the folder has another recipe, or no rules are named."""
    bits = [f"bits.{part}={width}" for part, width in asdict(config.bits).items()]
    recipe = load(RunConfig, [config.model, *([config.rules] if config.rules else [])], bits)
    amount = f"{config.num_images} images, batches of {config.batch_size}"
    recipe = replace(
        recipe,
        method="tdq-qat" if config.dynamic else "lsq-qat",
        segments=PER_STEP if config.dynamic else 1,
        passes=[],
        calibration=Calibration(steps=1),
        checkpoint=config.checkpoint or recipe.checkpoint,
        preset=f"{amount}, lr {config.lr:g} ({_digest(config)})",
        seed=config.seed,
        out=config.out,
        device=config.device,
        threads=config.threads,
    )
    check(recipe)
    if not recipe.rules:
        remedy = "give the method YAML whose rules do, for example rules=configs/method/tdq.yaml"
        raise ValueError(f"nothing says what is quantized; {remedy}")
    run = Run(recipe)
    if run.path("config.yaml").exists():
        return reopen(recipe)
    recipe.provenance = provenance(run.model, [config.model, config.rules])
    write_config(run)
    return run


def _digest(config: TrainConfig) -> str:
    """Of all keys that change what is learned."""
    keys = {key: value for key, value in asdict(config).items() if key not in KEYS_WITHOUT_EFFECT}
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]

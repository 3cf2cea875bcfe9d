"""TinyDM on the command line:

    tinydm COMMAND [words]            or  python -m tinydm COMMAND [words]
    tinydm COMMAND --help             what it does and every key with its default

A run goes through calibrate, quantize, sample (twice: as quantized, and with precision=float),
evaluate and report:

    tinydm calibrate cifar10-compact w4a8 qdiffusion demo out=runs/first
    tinydm quantize runs/first

A configuration is named by its path or by its name in configs."""

import importlib
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass

from base.errors import asks_for_help, guard, stop, unknown_word
from tinydm.keys import show_keys

RECIPE = ("model", "bits", "method", "preset")
# classes whose keys a command has
RUN, PLAN = "tinydm.recipe.RunConfig", "tinydm.plan.CompareConfig"
TRAIN = "tinydm.training.config.TrainConfig"
BENCH = "tinydm.benchmark.command.BenchmarkConfig"
COST = "tinydm.benchmark.calibration.CalibrationConfig"
GROWTH = "tinydm.benchmark.growth.GrowthConfig"


@dataclass(frozen=True)
class Command:
    """What a word of the command line stands for: one line about it, the module whose `run(words)`
    does it and whose docstring explains it, the dataclass of its keys, the folders of configs whose
    files its plain words name, whether it does nothing without words, whether several workers that
    torchrun starts can share it."""

    about: str
    module: str
    schema: str = ""
    kinds: tuple[str, ...] = ()
    needs_words: bool = True
    for_workers: bool = False


COMMANDS = {
    "calibrate": Command(
        "collect calibration data", "tinydm.stages.calibrate", RUN, RECIPE, for_workers=True
    ),
    "quantize": Command(
        "quantize the model of a run", "tinydm.stages.quantize", RUN, RECIPE, for_workers=True
    ),
    "sample": Command("draw images with it", "tinydm.stages.sample", RUN, for_workers=True),
    "evaluate": Command("score the images", "tinydm.stages.evaluate", RUN),
    "report": Command("one page about runs", "tinydm.report.command"),
    "compare": Command("methods under one protocol", "tinydm.compare", PLAN, ("compare",)),
    "analyze": Command("measure ranges and errors of a run", "tinydm.stages.analyze", RUN),
    "retabulate": Command("a run at another number of steps", "tinydm.stages.retabulate", RUN),
    "table": Command("tables of scored runs", "tinydm.report.table"),
    "benchmark": Command("measure speed", "tinydm.benchmark.command", BENCH, needs_words=False),
    "benchmark calibration": Command(
        "measure time to quality",
        "tinydm.benchmark.calibration",
        COST,
        ("compare",),
        needs_words=False,
    ),
    "benchmark growth": Command(
        "calibration by units", "tinydm.benchmark.growth", GROWTH, needs_words=False
    ),
    "export": Command("the network for other runtimes", "tinydm.stages.export"),
    "train": Command("train a model, also quantized", "tinydm.training.train", TRAIN, ("train",)),
    "download": Command("fetch public checkpoints", "models.download"),
    "doctor": Command("what is here and what is missing", "tinydm.doctor", needs_words=False),
}


def main(arguments: list[str] | None = None) -> None:
    """One command; `arguments` are those of the process unless given."""
    word, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if rest and f"{word} {rest[0]}" in COMMANDS:
        word, *rest = f"{word} {rest[0]}", *rest[1:]
    if asks_for_help([word]):
        print(overview())
    elif word not in COMMANDS:
        stop(2, f"error: {unknown_word(f'command {word!r} is unknown', word, COMMANDS)}")
    elif asks_for_help(rest) or not rest and COMMANDS[word].needs_words:
        print(help_of(COMMANDS[word]))
    else:
        guard(lambda words: run(COMMANDS[word], words), rest)


def run(command: Command, words: list[str]) -> None:
    """Do it, in the words of the command line with plain names made paths, by as many workers as
    torchrun has started."""
    with _workers(command):
        # later stages are given a run folder: of them only a dry run of quantize takes names
        is_later = command.module.endswith("quantize") and "dry_run=true" not in words
        if command.kinds and not is_later:
            pairs = zip(["", *words], words)
            words = [_named(word, before, command.kinds) for before, word in pairs]
        importlib.import_module(command.module).run(words)


def _workers(command):
    if "WORLD_SIZE" not in os.environ:
        return nullcontext()
    from base.workers import joined  # imports PyTorch, which some commands can do without

    return joined(command.for_workers)


def _named(word: str, before: str, kinds: tuple[str, ...]) -> str:
    """The path that a word stands for; flags, their values and key=value stay."""
    from tinydm.names import find_yaml  # imports PyTorch, which `tinydm --help` can do without

    is_value = before.startswith("-") and before != "--base"
    return word if "=" in word or word.startswith("-") or is_value else find_yaml(word, kinds)


def overview() -> str:
    lines = [f"  {word:23}{command.about}" for word, command in COMMANDS.items()]
    return "\n".join([__doc__, "", *lines])


def help_of(command: Command) -> str:
    """What the command does, then the keys of its configuration."""
    text = importlib.import_module(command.module).__doc__.strip()
    if not command.schema:
        return text
    module, _, name = command.schema.rpartition(".")
    keys = show_keys(getattr(importlib.import_module(module), name))
    return f"{text}\n\nKeys and their defaults (key=value):\n\n{keys}"

"""The recipe of a run: all keys, and what is refused before any work begins."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

from base.config import load
from base.errors import check_options, unknown_word
from ddim.sampler import SAMPLERS, STOCHASTIC
from ddim.schedule import make_schedule
from models.sampling import Sampling
from quant.calibration.builders import check_builder
from quant.passes.find import find_pass
from quant.passes.order import check_needs
from quant.passes.run import changed_passes, check_passes, with_effort
from quant.rules import check_bits, check_rules
from quant.timeline import segment_boundaries
from tinydm.earlier import renewed
from tinydm.stages.trajectories import STARTS

# keys that must be at least 1
COUNTS = (
    "sampling.num sampling.batch_size sampling.steps calibration.images calibration.steps "
    "evaluation.sqnr_images max_batch"
).split()


@dataclass
class Bits:
    """Widths that the rules of a method refer to; 32 = floating point."""

    weight: int = 8  # of weights
    input: int = 8  # of the inputs of layers
    softmax: int = 8  # of attention maps; a model may want more


@dataclass
class Calibration:
    """Calibration data: `steps` * `images` samples of `images` trajectories, or a file."""

    # which steps of which images: a word of quant.calibration.builders.BUILDERS
    builder: str = "uniform"
    options: dict[str, Any] = field(default_factory=dict)  # of the builder
    steps: int = 20  # samples of each trajectory, on average
    images: int = 256  # one trajectory each
    seed: int = 1000  # of the trajectories and of what is picked
    start: str = "normal"  # of the trajectories: normal | i2n | di2n, see scripts/calibrate.py
    start_step: float = 1.0  # share of the chain that they run through; 1 = all of it
    data: str = ""  # images for start: i2n, a folder or cifar10[:FOLDER]
    file: str = ""  # ready-made set: our safetensors or a torch file {"xs", "ts"}


@dataclass
class Guidance:
    """Classifier-free guidance: its scale and the class or prompt that means no condition."""

    scale: float = 1.0  # 1 = none
    null_class: int | None = None  # class that stands for no condition
    null_prompt: str = ""  # prompt that stands for no condition


@dataclass
class Effort:
    """Counts and rates of reconstruction; the defaults are the published ones."""

    weight_iters: int = 20000  # optimizer steps on the rounding of each unit
    input_iters: int = 5000  # then on the scales of its inputs
    weight_lr: float = 1e-3  # of the rounding
    input_lr: float = 4e-4  # of scales
    batch_size: int = 32  # samples of a step
    # null, as the method says: samples of the calibration set that are learned from
    num_samples: int | None = None
    # null, as the method says: values that a range search sees of each group
    num_values: int | None = None
    # null, as the method says: begin the rounding halfway to second-order codes
    gptq: bool | None = None
    # fp32 | bf16 | auto: bf16 where a trial finds it faster; config.yaml says which
    dtype: str = "fp32"


@dataclass
class Evaluation:
    """Arguments of distribution_scores, and the number of images on which SQNR is measured."""

    extractor: str = "auto"  # auto | inception | cifar-resnet: what features come from
    inception_path: str = ""  # file of the Inception weights
    fetch: bool = False  # fetch them
    reference: str = ""  # images to compare with: a folder, or cifar10-train[:FOLDER]
    sqnr_images: int = 64  # full-precision trajectories on which SQNR by step is measured


@dataclass
class RunConfig:
    """All keys of a run: YAMLs of model, bits, method and preset, then key=value, in this order."""

    name: str = ""  # of the model
    network: dict[str, Any] = field(default_factory=dict)  # its family and that one's options
    first_stage: dict[str, Any] = field(default_factory=dict)  # of latent models: the autoencoder
    # of latent models: what encodes the condition
    cond_stage: dict[str, Any] = field(default_factory=dict)
    # of the latents; None: from the checkpoint, 1 where it has none
    scale_factor: float | None = None
    guidance: Guidance = field(default_factory=Guidance)
    checkpoint: str = ""  # file of the weights, or a folder of the diffusers library
    weights: str = "ema"  # ema | raw, where a checkpoint has both
    download: str = ""  # command that fetches the checkpoint
    demo: str = ""  # command that does the same with a model that ships
    schedule: dict[str, Any] = field(default_factory=dict)  # options of ddim.schedule.make_schedule
    bits: Bits = field(default_factory=Bits)
    method: str = ""  # its name, which the rows of a comparison go by
    variant: str = ""  # of the method in a comparison, as its tables call it
    segments: Any = 1  # of time: 1, a number, per_step, or [boundaries]
    rules: list[Any] = field(default_factory=list)  # what is quantized and how; later ones win
    exceptions: list[Any] = field(default_factory=list)  # rules on top of those of any method
    passes: list[Any] = field(default_factory=list)  # what is done to the network, in order
    # on top of `passes`, by name; null: without it
    pass_options: dict[str, Any] = field(default_factory=dict)
    preset: str = "paper"  # its name
    effort: Effort = field(default_factory=Effort)
    calibration: Calibration = field(default_factory=Calibration)
    sampling: Sampling = field(default_factory=Sampling)
    evaluation: Evaluation = field(default_factory=Evaluation)
    seed: int = 0  # of everything random in quantization
    out: str = ""  # the run folder
    device: str = "auto"  # auto | cpu | cuda[:N]
    threads: int = 0  # CPU threads; 0 = PyTorch's choice
    memory_gb: float = 4.0  # captured activations held in memory; the rest spills to disk
    # captured activations on disk at most; null: what is free there, less 2 GiB
    disk_gb: float | None = None
    # samples at most that a pass measures at once; learning: effort.batch_size
    max_batch: int = 256
    force: bool = False  # do a finished stage again
    # versions, commit and hashes, which a run notes by itself
    provenance: dict[str, Any] = field(default_factory=dict)
    renewed = staticmethod(renewed)  # what base.config.load reads files of earlier versions by

    def __post_init__(self):
        if all(isinstance(entry, str | dict) for entry in self.passes):
            said = vars(self.effort).items()
            effort = {key: value for key, value in said if value not in ("auto", None)}
            self.passes = with_effort(self.passes, effort)

    def with_dtype(self, dtype: str) -> "RunConfig":
        """This recipe, decided where effort.dtype is auto."""
        if self.effort.dtype != "auto":
            return self
        return replace(self, effort=replace(self.effort, dtype=dtype))

    @property
    def all_rules(self) -> list[dict[str, Any]]:
        """The rules of the method, then the exceptions. 32 bits for inputs leave those in floating
        point that a method's rules hold at other widths too."""
        weights_only = [{"match": "*", "input": {"bits": 32}}] if self.bits.input == 32 else []
        return [*self.rules, *weights_only, *self.exceptions]

    @property
    def all_passes(self) -> list[dict[str, Any]]:
        """The passes of the method with pass_options on top."""
        return changed_passes(self.passes, self.pass_options)


def load_recipe(files: Iterable[Path | str], words: Iterable[str] = ()) -> RunConfig:
    """Merges `files` and key=value words. effort.dtype: auto is what the run folder that is there
    already says; in a new one `quantize` decides."""
    config = load(RunConfig, files, words)
    saved = Path(config.out) / "config.yaml"
    if config.effort.dtype == "auto" and config.out and saved.exists():
        return config.with_dtype(load(RunConfig, [saved]).effort.dtype)
    return config


def check(config: RunConfig) -> None:
    """Raises ValueError for what types alone do not catch, before any work begins."""
    if not config.out:
        raise ValueError("say where the run lives: out=FOLDER")
    if not config.network:
        raise ValueError("no model was given; name a configs/model/*.yaml")
    check_bits(config.bits.weight, "weight")
    check_bits(config.bits.input, "input")
    check_bits(config.bits.softmax, "input")
    if config.effort.dtype not in ("fp32", "bf16", "auto"):
        raise ValueError(f"effort.dtype is {config.effort.dtype}; it must be fp32, bf16 or auto")
    _check_schedule(config.schedule)
    num_segments = len(boundaries(config)) + 1
    check_rules(config.all_rules)
    passes = check_passes(config.all_passes)
    if config.passes:
        check_needs(passes, config.all_rules, num_segments)
    check_builder(config.calibration.builder, config.calibration.options)
    _check_start(config.calibration)
    _check_seeds(config)
    _check_sampling(config)
    for key in COUNTS:
        value = reduce(getattr, key.split("."), config)
        if value < 1:
            raise ValueError(f"{key} is {value}; it must be at least 1")


def _check_schedule(schedule):
    known = inspect.signature(make_schedule).parameters
    check_options("schedule", schedule, known, kind="key")
    for key, value in schedule.items():
        kind = type(known[key].default)
        if kind in (int, float) and (type(value) not in (int, kind) or value <= 0):
            wanted = "whole number" if kind is int else "number"
            raise ValueError(f"schedule.{key} is {value}; it must be a {wanted} above 0")


def _check_sampling(config):
    sampler, eta = config.sampling.sampler, config.sampling.eta
    if sampler not in SAMPLERS:
        raise ValueError(unknown_word(f"sampler '{sampler}' is unknown", sampler, SAMPLERS))
    if eta and sampler not in STOCHASTIC:
        remedy = f"set it to 0, or choose {' or '.join(STOCHASTIC)}"
        raise ValueError(f"{sampler} is deterministic, but sampling.eta is {eta}; {remedy}")
    asked, there = config.calibration.steps, len(network_times(config))
    if asked > there and not config.calibration.file:
        raise ValueError(
            f"calibration.steps is {asked}, but the sampler has {there} steps; choose at most "
            "that many"
        )


def _check_seeds(config):
    """Refuses images to be scored that are those which the network would be fitted to."""
    fitted = {} if config.calibration.file else {"calibration.seed": config.calibration.seed}
    for name, options in check_passes(config.all_passes):
        known = {} if "." in name else inspect.signature(find_pass(name)).parameters
        if "seed" in known:
            fitted[f"seed of the pass {name}"] = options.get("seed", known["seed"].default)
    for key, seed in fitted.items():
        if seed == config.sampling.seed:
            raise ValueError(
                f"sampling.seed and the {key} are both {seed}: the network would be fitted to the "
                "images that it is scored on; choose another sampling.seed"
            )


def _check_start(c):
    if c.start not in STARTS:
        raise ValueError(unknown_word(f"calibration.start '{c.start}' is unknown", c.start, STARTS))
    if not 0 < c.start_step <= 1 or c.start == "normal" and c.start_step != 1:
        raise ValueError(
            f"calibration.start_step is {c.start_step} with start '{c.start}'; it must lie above "
            "0 and at most at 1, and at 1 with start normal (pure noise is right at the noisiest "
            "step only)"
        )
    if c.start == "i2n" and not c.data:
        remedy = "give calibration.data=FOLDER or calibration.data=cifar10"
        raise ValueError(f"calibration.start is i2n, which needs images; {remedy}")


def network_times(config: RunConfig) -> list[float]:
    """Returns the times at which the sampler runs the network, ascending."""
    schedule = make_schedule(**config.schedule)
    return [step * schedule.time_scale for step in config.sampling.sequence(schedule)]


def boundaries(config: RunConfig) -> list[float]:
    """Returns the boundaries of the time segments that `segments` asks for."""
    return segment_boundaries(network_times(config), config.segments)

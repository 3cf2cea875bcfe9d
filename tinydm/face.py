"""Quantization in Python: what `import tinydm` offers.

A model, a recipe and calibration data give the quantized model, to the byte what the command line
makes of the same words. Axes: N images, C channels, H x W pixels."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from base.config import load as load_config
from base.devices import exact_arithmetic, resolve_device
from models import diffusion
from models.diffusion import DiffusionModel
from quant.calibration.dataset import CalibrationSet
from quant.calibration.files import load_calibration
from quant.checkpoint import save_quantized
from quant.network import QuantizedNet
from tinydm.identity import IMAGES, decides
from tinydm.names import find_yaml
from tinydm.precision import with_precision
from tinydm.recipe import RunConfig, check, load_recipe
from tinydm.run_folder import Run, claim
from tinydm.stages import quantize as stage
from tinydm.stages.calibrate import check_fits, collect

LOG = logging.getLogger("tinydm")


@dataclass
class Model(DiffusionModel):
    """A DiffusionModel with what it was loaded by: `files` and key=value `words`."""

    files: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    # precision -> the network that computes so, as soon as there is one
    computing: dict[str, QuantizedNet] = field(default_factory=dict, init=False, repr=False)

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.net, QuantizedNet)

    def sample(
        self, indices: Iterable[int], precision: str = "auto", **changes: Any
    ) -> torch.Tensor:
        """Draws images as DiffusionModel.sample does. A quantized model computes by `precision`:
        on integers where that is exact and faster (auto), or integer, or simulated; the images are
        the same to the byte.

        >>> small.sample(range(2), precision="integer").shape
        torch.Size([2, 3, 16, 16])
        """
        if not self.is_quantized:
            return super().sample(indices, **changes)
        if precision not in self.computing:
            batch_size = changes.get("batch_size", self.sampling.batch_size)
            model, about = with_precision(self, precision, batch_size)
            LOG.info("sample: %s", about)
            self.computing[precision] = model.net
        computing = self.with_net(self.computing[precision])
        return DiffusionModel.sample(computing, indices, **changes)

    def save(self, path: Path | str) -> None:
        """Writes a quantized model as one safetensors file, which `load` reads: packed weights,
        scales and the recipe. Raises ValueError for a model that is not quantized.

        >>> small.save("small.safetensors")
        """
        if not self.is_quantized:
            raise ValueError(f"{self.name} is not quantized; save what tinydm.quantize returns")
        save_quantized(path, self.net, self.net.recipe)


@dataclass(frozen=True, init=False)
class Recipe:
    """How to calibrate and quantize: a method, widths and a preset, each a name in configs or a
    YAML, and key=value words on top. Raises ValueError for what is unknown.

    >>> words = "calibration.images=4", "calibration.steps=3"
    >>> recipe = tinydm.Recipe("minmax", *words, bits="w4a8", preset="demo")
    >>> recipe.bits.endswith("configs/bits/w4a8.yaml")
    True
    """

    method: str
    words: tuple[str, ...]
    bits: str
    preset: str

    def __init__(
        self,
        method: Path | str,
        *words: str,
        bits: Path | str | None = None,
        preset: Path | str | None = None,
    ) -> None:
        names = {"method": method, "bits": bits, "preset": preset}
        for kind, name in names.items():
            object.__setattr__(self, kind, "" if name is None else find_yaml(name, [kind]))
        object.__setattr__(self, "words", words)
        load_config(RunConfig, self.files, words)
        for key in (word.partition("=")[0] for word in words):
            if key == "out":
                raise ValueError("'out' is no part of a recipe; give tinydm.quantize resume=FOLDER")
            if decides(key) == IMAGES or key == "device":
                remedy = "give it to tinydm.load_model, not to a recipe"
                raise ValueError(f"'{key}' belongs to the model: {remedy}")

    @property
    def files(self) -> list[str]:
        """The YAMLs, in the order in which they are merged."""
        return [file for file in (self.bits, self.method, self.preset) if file]

    def config(self, model: Model, out: str = "none") -> RunConfig:
        """Merges this recipe with that of a model, checked; `out` is the run folder."""
        if model.is_quantized:
            raise ValueError(f"{model.name} is quantized already; load the model anew")
        words = [*model.words, *self.words, f"device={model.device}", f"out={out}"]
        config = load_recipe([*model.files, *self.files], words)
        check(config)
        return config


def load_model(
    name: Path | str, *words: str, device: str = "auto", like: Path | str | None = None
) -> Model:
    """Loads a pretrained model: a name in configs/model, a YAML, or, with `like`, a folder that the
    diffusers library saved of the network that this name or YAML describes.

    Key=value `words` go on top, for example sampling.steps=50 or checkpoint=FILE; `device` is auto,
    cpu, cuda or cuda:1. Raises ValueError for what is unknown or does not fit.

    >>> model = tinydm.load_model(tiny, "sampling.steps=3", device="cpu")
    >>> model.shape
    (3, 16, 16)
    """
    if like is not None:
        words = (f"checkpoint={Path(name).expanduser().resolve()}", *words)
    elif Path(name).is_dir():
        raise ValueError(
            f"{name} is a folder, which does not say how its network is used; name a model with "
            "the same network: load_model(folder, like='cifar10')"
        )
    file = find_yaml(name if like is None else like, ["model"])
    config = load_config(RunConfig, [file], words)
    if not config.network:
        raise ValueError(f"{file} describes no network; name a configs/model/*.yaml")
    model = diffusion.load_model(asdict(config), device=resolve_device(device))
    return _model(model, files=[file], words=[*words])


def calibrate(model: Model, recipe: Recipe, folder: Path | str | None = None) -> CalibrationSet:
    """Collects calibration data along the model's own full-precision trajectories: x (N, C, H, W),
    t (N,) and, of a conditional model, conditions.

    With a `folder` the trajectories stay there, for other recipes that need the same. Raises
    ValueError for a recipe that cannot work with this model.

    >>> data = tinydm.calibrate(model, recipe)
    >>> len(data), data.x.shape
    (12, torch.Size([12, 3, 16, 16]))
    """
    config = recipe.config(model)
    with exact_arithmetic(config.threads):
        return collect(model, config, None if folder is None else Path(folder))


def quantize(
    model: Model,
    recipe: Recipe,
    data: CalibrationSet,
    resume: Path | str | None = None,
    log: Callable[[str], Any] = stage.log_line,
) -> Model:
    """Quantizes a model by a recipe with the data of `calibrate`; returns the same model around the
    quantized network and leaves `model` as it was.

    `resume` is a run folder: called again, it goes on from what is finished there, and the command
    line draws, scores and reports from it. `log` takes lines of progress. Raises ValueError for
    data of another model and for a folder of another recipe or other data.

    >>> small = tinydm.quantize(model, recipe, data)
    >>> small.is_quantized, small.sample(range(2)).shape
    (True, torch.Size([2, 3, 16, 16]))
    """
    check_fits(data, model)
    made_with = data.made.get("weights_hash", model.weights_hash)
    if made_with != model.weights_hash:
        raise ValueError(
            f"the calibration data were made with other weights of {model.name}; calibrate again"
        )
    config = recipe.config(model, "none" if resume is None else str(resume))
    if resume is None:
        with exact_arithmetic(config.threads):
            net, stored = stage.quantize_model(model, config, data, log=log)
        net.recipe = stored
        return model.with_net(net)
    run = claim(config, [*model.files, *recipe.files], model)
    _put_calibration(run, data)
    log(stage.quantize(run, log))
    return stage.with_quantized(model, run.path("quantized.safetensors"))


def _put_calibration(run: Run, data: CalibrationSet) -> None:
    """Keeps the data in a run folder. Raises ValueError where others are there."""
    path = run.path("calibration.safetensors")
    if not path.exists():
        data.save(path)
        return
    there = load_calibration(path)
    for name in ("x", "t", "cond", "which", "trajectory"):
        a, b = getattr(there, name), getattr(data, name)
        if (a is None) != (b is None) or a is not None and not torch.equal(a, b):
            remedy = "choose another resume= folder, or delete that one"
            raise ValueError(f"{path} holds other calibration data; {remedy}")


def compare_images(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """Compares images of the same seeds, (N, 3, H, W) uint8 each: the means of PSNR in dB, SSIM
    and, for 32x32 pixels, LPIPS. Equal pairs are counted and left out of the mean of PSNR, which is
    None if no other is left. Raises ValueError for images of different shapes or smaller than
    11x11, and for no images.

    >>> scores = tinydm.compare_images(model.sample(range(2)), small.sample(range(2)))
    >>> sorted(scores)
    ['LPIPS-cifar-resnet', 'count', 'identical', 'psnr_db', 'ssim']
    """
    from evaluation.scores import paired  # takes seconds to import

    return paired.compare_images(a.cpu(), b.cpu())


def load(path: Path | str, device: str = "auto", checkpoint: str = "") -> Model:
    """Loads a quantized model that `Model.save` or the command line wrote, ready to sample.

    Its checkpoint, which the file names, gives what is around the network; `checkpoint` is another
    place of it. Raises ValueError for another file and for other weights.

    >>> again = tinydm.load("small.safetensors", device="cpu")
    >>> bool((again.sample(range(2)) == small.sample(range(2))).all())
    True
    """
    return _model(stage.load_quantized_model(path, device, checkpoint))


def _model(model: DiffusionModel, **more: Any) -> Model:
    return Model(**{part.name: getattr(model, part.name) for part in fields(model)}, **more)

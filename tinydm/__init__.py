"""Quantize pretrained diffusion models after training.

>>> import tinydm
>>> model = tinydm.load_model(tiny)
>>> recipe = tinydm.Recipe("minmax", "calibration.images=4", "calibration.steps=3", bits="w4a8")
>>> data = tinydm.calibrate(model, recipe)
>>> small = tinydm.quantize(model, recipe, data)
>>> scores = tinydm.compare_images(model.sample(range(4)), small.sample(range(4)))
>>> small.save("small.safetensors")
>>> again = tinydm.load("small.safetensors")

The rest of the package is behind these names: stages, run folders, reports and training. The names
are looked up when they are first used, so that `tinydm --help` and the like start at once."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinydm.face import Model, Recipe, calibrate, compare_images, load, load_model, quantize

__all__ = ["Model", "Recipe", "calibrate", "compare_images", "load", "load_model", "quantize"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("tinydm.face"), name)
    raise AttributeError(f"module 'tinydm' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

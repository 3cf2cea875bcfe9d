"""What block reconstruction learns towards, and how: the options of the pass `reconstruct`, whose
docstring explains them (quant/passes/reconstruct.py)."""

from dataclasses import dataclass
from typing import Literal

from base.config import Share

Dtype = Literal["fp32", "bf16"]  # in which the steps are computed: float32, or by autocast


@dataclass(frozen=True)
class Objective:
    """The loss of a unit (learn.py, loss.py, saliency.py, frequency.py of this folder)."""

    weight_norm: float = 2.0  # p of the error while the rounding is learned
    input_norm: float = 2.4  # and while the scales of activations are
    round_weight: float = 0.01  # of the penalty that drives the rounding to 0 or 1
    layer_weight: float = 0.0  # of the error of a block's inner layers
    saliency: Share = 0.0
    frequency: Share = 0.0
    smooth: float = 0.0  # holds the scales of neighbouring time segments together


@dataclass(frozen=True)
class Schedule:
    """The steps of learning (learn.py, gptq.py of this folder)."""

    weight_iters: int = 20000
    input_iters: int = 5000
    batch_size: int = 32
    num_samples: int | None = None  # of the calibration set that are learned from; None: all
    weight_lr: float = 1e-3
    input_lr: float = 4e-4
    soft_lr: float = 1e-4  # of what gives scales while they are learned
    weight_cosine: bool = False
    warmup: Share = 0.2  # share of the steps before the rounding penalty sets in
    beta_start: float = 20.0  # of the rounding penalty, after the warm-up and in the end
    beta_end: float = 2.0
    joint: bool = False
    drop: Share = 0.5
    active: float = 0.0
    visit_cost: float = 0.0
    gptq: bool = False
    dtype: Dtype = "fp32"

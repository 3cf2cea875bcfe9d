"""Quantization-aware training of a diffusion model."""

from typing import Any

import torch

from models.diffusion import DiffusionModel
from quant.calibration.dataset import CalibrationSet
from quant.convert import convert
from quant.qat import SMALLEST, prepare, scales_of
from tinydm.training.config import TrainConfig
from tinydm.training.diffusion import Conditional, DiffusionTraining
from tinydm.training.loop import Batch


class QuantizedTraining(DiffusionTraining):
    """Quantization-aware training (quant/qat.py) of a pretrained `model`, whose network it takes
    over: the same loss on the network converted by `rules`, `dynamic` or not. Ranges are those of
    one `batch` at random t.

    AdamW, scales at a tenth of the rate and without weight decay (TDQ's groups). First and
    condition stage stay as they are; the average begins at the quantized network."""

    def __init__(
        self,
        model_config: dict[str, Any],
        config: TrainConfig,
        model: DiffusionModel,
        rules: list[dict[str, Any]],
        dynamic: bool,
        batch: Batch,
    ) -> None:
        def encode(labels):
            return model.condition.encode(labels.tolist())

        has_classes = model.condition is not None
        net = Conditional(convert(model.net, rules), encode if has_classes else None)
        super().__init__(model_config, config, model.first_stage, model.scale_factor, net)
        x, t, labels, _ = self.noised(batch)
        cond = (encode(labels), torch.arange(len(x))) if has_classes else (None, None)
        prepare(net.unet, CalibrationSet(x, t, *cond), dynamic)
        net.train()
        self.pretrained, self.scales = model, scales_of(net.unet)
        self.restart_average()

    def build_optimizer(self) -> torch.optim.Optimizer:
        scales = {id(scale) for scale in self.scales}
        others = [p for p in self.net.parameters() if p.requires_grad and id(p) not in scales]
        c, betas = self.config, (0.9, self.config.beta2)
        groups = [{"params": others}, {"params": self.scales, "lr": c.lr / 10, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=c.lr, betas=betas, weight_decay=c.weight_decay)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for scale in self.scales:
            scale.clamp_(min=SMALLEST)
        super().on_train_batch_end()

    def model(self) -> DiffusionModel:
        """Returns the model around the averaged network, its quantization simulated."""
        return self.pretrained.with_net(self.ema.module.unet.eval())

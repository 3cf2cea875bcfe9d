"""Self-attention-aware quantization: what the full-precision attention maps say about where errors
matter.

Received attention of position p, averaged over the heads: w_p = 1/H sum_h sum_i A[h, i, p]; the
mean over p is 1, as every row of A sums to 1. Self-attention guidance masks images by the same map
(Hong et al. 2023, arXiv:2210.00939)."""

import torch
import torch.nn.functional as F
from torch import nn

from base.hooks import watching
from base.network import Matmul, attention_parts
from quant.calibration.dataset import CalibrationSet


def received_attention(probs: torch.Tensor) -> torch.Tensor:
    """Sums what every position receives: probs (N, [heads,] L queries, L keys), rows sum to 1 ->
    (N, L), mean 1 over L."""
    received = probs.sum(-2)
    return received.mean(1) if received.dim() == 3 else received


class Saliency:
    """Weights of the reconstruction error: omega = (1 - kappa) + kappa * w, w from the attention
    map of the network whose resolution is nearest to the output's, resized and normalised to mean 1
    per sample.

    Called as saliency(rows, out) -> (N, 1, H, W) for feature maps, (N, L, 1) for tokens, None for
    outputs without positions. `kappa` in [0, 1]. Maps are square; attention to a context does not
    count."""

    def __init__(self, net: nn.Module, calibration: CalibrationSet, kappa: float, batch_size: int):
        if not 0 <= kappa <= 1:
            raise ValueError(f"saliency is {kappa}; it must lie in 0 to 1")
        self.kappa, self.maps = kappa, record_maps(net, calibration, batch_size)
        if not self.maps:
            raise ValueError(
                "saliency needs a network with self-attention, and this one has none; set "
                "saliency: 0"
            )

    def __call__(self, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        if out.dim() < 3:
            return None
        tokens = out.dim() == 3
        height, width = (round(out.shape[1] ** 0.5),) * 2 if tokens else out.shape[2:]
        nearest = min(self.maps, key=lambda size: abs(size - height))
        w = self.maps[nearest][rows].to(out.device).reshape(-1, 1, nearest, nearest)
        if (height, width) != (nearest, nearest):
            w = F.interpolate(w, size=(height, width), mode="bilinear")
        w = w / w.mean((2, 3), keepdim=True)
        omega = (1 - self.kappa) + self.kappa * w
        return omega.flatten(2).transpose(1, 2) if tokens else omega


@torch.no_grad()
def record_maps(
    net: nn.Module, calibration: CalibrationSet, batch_size: int
) -> dict[int, torch.Tensor]:
    """Records the attention received over a calibration set: size -> (samples, size^2), the mean
    over the maps of that size."""
    found, maps, device = {}, {}, next(net.parameters()).device

    def note(product: Matmul, operands):
        probs = operands[product.roles.index("probs")]
        if product.roles[0] == "v":  # (.., keys, queries)
            probs = probs.transpose(-1, -2)
        found.setdefault(int(probs.shape[-1] ** 0.5), []).append(received_attention(probs.float()))

    products = [part.av for part in attention_parts(net) if part.is_to_itself]
    with watching(net, dict.fromkeys(products, note), before=True):
        for arguments in calibration.batches(batch_size):
            found.clear()
            net(*(a.to(device) for a in arguments))
            for size, parts in found.items():
                maps.setdefault(size, []).append(torch.stack(parts).mean(0).cpu())
    return {size: torch.cat(parts) for size, parts in maps.items()}

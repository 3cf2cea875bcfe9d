"""Self-attention-aware quantization: what the full-precision attention maps say about where errors
matter.

Received attention of position p, averaged over the heads: w_p = 1/H sum_h sum_i A[h, i, p]; the
mean over p is 1, as every row of A sums to 1. Self-attention guidance masks images by the same map
(Hong et al. 2023, arXiv:2210.00939)."""

import torch
import torch.nn.functional as F

from base.network import attention_parts


def received_attention(probs):
    """probs (N, [heads,] L queries, L keys), rows sum to 1 -> (N, L), mean 1 over L."""
    received = probs.sum(-2)
    return received.mean(1) if received.dim() == 3 else received


class Saliency:
    """Weights of the reconstruction error: omega = (1 - kappa) + kappa * w, w from the attention
    map of the network whose resolution is nearest to the output's, resized and normalised to mean 1
    per sample.

    Called as saliency(rows, out) -> (N, 1, H, W) for feature maps, (N, L, 1) for tokens, None for
    outputs without positions. `kappa` in [0, 1]. Maps are square; attention to a context does not
    count."""

    def __init__(self, net, calibration, kappa, batch_size):
        if not 0 <= kappa <= 1:
            raise ValueError(f"saliency is {kappa}; it must lie in 0 to 1")
        self.kappa, self.maps = kappa, record_maps(net, calibration, batch_size)
        if not self.maps:
            raise ValueError(
                "saliency needs a network with self-attention, and this one has none; set "
                "saliency: 0"
            )

    def __call__(self, rows, out):
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
def record_maps(net, calibration, batch_size):
    """Received attention over a calibration set: size -> (samples, size^2), the mean over the maps
    of that size."""
    found, modules = {}, dict(net.named_modules())

    def note(module, operands):
        probs = operands[module.roles.index("probs")]
        if module.roles[0] == "v":  # (.., keys, queries)
            probs = probs.transpose(-1, -2)
        found.setdefault(int(probs.shape[-1] ** 0.5), []).append(received_attention(probs.float()))

    hooks = [
        modules[part.av].register_forward_pre_hook(note)
        for part in attention_parts(net)
        if part.is_to_itself
    ]
    device, maps = next(net.parameters()).device, {}
    try:
        for arguments in calibration.batches(batch_size):
            found.clear()
            net(*(a.to(device) for a in arguments))
            for size, parts in found.items():
                maps.setdefault(size, []).append(torch.stack(parts).mean(0).cpu())
    finally:
        for hook in hooks:
            hook.remove()
    return {size: torch.cat(parts) for size, parts in maps.items()}

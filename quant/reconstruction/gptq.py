"""Second-order rounding of weights (GPTQ, Frantar et al. 2023, arXiv:2210.17323), from which
AdaRound may begin.

Codes Q that nearly minimise tr (W - s Q) H (W - s Q)^T, H = X^T X / n + ridge for the layer's
inputs X: each column in turn is rounded to nearest and its error led into the columns still to
come,

    W_k <- W_k - (W_j - s Q_j) U_jk / U_jj   (k > j),      U^T U = H^-1, U upper triangular,

those with the largest H_jj first.

Axes: O output channels, M columns of the flat weight (input channels x kernel), n positions, N
samples."""

import torch
import torch.nn.functional as F

from base.hooks import watching
from quant.layers import QuantLayer
from quant.reconstruction.unit import Inputs, Unit

BLOCK = 128  # columns between two updates of all that follow
SAMPLES, POSITIONS = 256, 8192  # of a layer's inputs, for H
RIDGE = 0.01  # share of the mean of H's diagonal


@torch.no_grad()
def second_order_codes(
    unit: Unit,
    layers: list[QuantLayer],
    inputs: Inputs,
    num_samples: int,
    generator: torch.Generator,
) -> list[torch.Tensor]:
    """Returns centred codes of the weight of each of the `layers` of a unit, fed with an even pick
    of its `inputs` over `num_samples` samples, weights in full precision."""
    rows = torch.linspace(0, num_samples - 1, min(SAMPLES, num_samples)).long()
    names = {layer: name for name, layer in unit.module.named_modules() if layer in layers}
    taken, each = {layer: [] for layer in layers}, max(1, POSITIONS // len(rows))

    def take(layer, arguments):
        for x in arguments[0].split(1):  # the columns of a batch would need gigabytes
            found = columns(layer, x)
            picked = torch.randperm(len(found), generator=generator)[:each]
            taken[layer].append(found[picked.to(x.device)])

    for layer in layers:
        layer.weight_quantizer.enabled = False
    try:
        with watching(unit.module, {names[layer]: take for layer in layers}, before=True):
            for part in rows.split(unit.batch_size):
                unit(inputs, part)
    finally:
        for layer in layers:
            layer.weight_quantizer.enabled = True
    return [rounded(layer, torch.cat(taken.pop(layer))) for layer in layers]


def columns(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """Returns what the rows of the flat weight are multiplied with, of an input of a layer: (N
    positions, M)."""
    if layer.inverse_balance is not None:
        x = x * layer.per_channel(layer.inverse_balance)
    if not layer.trailing:
        return x.flatten(0, -2)
    options, kernel = dict(layer.operation.keywords), layer.shape[2:]
    if layer.trailing == 1:  # as a convolution of one row
        x, kernel = x[:, :, None], (1, *kernel)
        options = {key: (0 if key == "padding" else 1, *value) for key, value in options.items()}
    return F.unfold(x, kernel, **options).transpose(1, 2).flatten(0, 1)


def rounded(layer: QuantLayer, x: torch.Tensor) -> torch.Tensor:
    """Returns codes, of the weight's shape, of a layer that reads the columns x (n, M)."""
    q, weight = layer.weight_quantizer, layer.weight.detach()
    tables = (q.table(values, weight).expand_as(weight) for values in (q.scale, q.zero_point))
    scale, zero_point = (table.flatten(1) for table in tables)
    low, high, hessian = q.low - zero_point, q.high - zero_point, x.T @ x / len(x)
    codes = optimal_codes(weight.flatten(1), scale, low, high, hessian)
    return codes.reshape(weight.shape)


def optimal_codes(
    weight: torch.Tensor,
    scale: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    hessian: torch.Tensor,
) -> torch.Tensor:
    """Returns integers Q (O, M), as floats, within low and high; these and `scale` have the shape
    of `weight`, `hessian` is (M, M) without its ridge."""
    order = hessian.diagonal().argsort(descending=True, stable=True)
    left, scale, low, high = (values[:, order] for values in (weight, scale, low, high))
    upper, codes = inverse_factor(hessian[order][:, order]), torch.empty_like(left)
    for start in range(0, len(order), BLOCK):
        end, errors = min(start + BLOCK, len(order)), []
        for j in range(start, end):
            codes[:, j] = (left[:, j] / scale[:, j]).round().clamp(low[:, j], high[:, j])
            errors.append((left[:, j] - codes[:, j] * scale[:, j]) / upper[j, j])
            left[:, j:end] -= errors[-1][:, None] * upper[j, j:end]
        left[:, end:] -= torch.stack(errors, 1) @ upper[start:end, end:]
    return codes[:, order.argsort()]


def inverse_factor(hessian: torch.Tensor) -> torch.Tensor:
    """Returns U of the module's docstring, computed in float64."""
    ridge = (RIDGE * hessian.diagonal().double().mean()).clamp(min=1e-30)
    lower = torch.linalg.cholesky(hessian.double() + ridge * torch.eye(len(hessian)).to(hessian))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).to(hessian)

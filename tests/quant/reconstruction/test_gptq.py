"""Second-order rounding: against its definition by explicit least squares, and what it is for."""

import pytest
import torch
from tiny import normal
from torch import nn

from base.network import tag
from quant.layers import QuantLayer
from quant.reconstruction.gptq import RIDGE, columns, optimal_codes, second_order_codes
from quant.reconstruction.rounding import Rounding
from quant.reconstruction.unit import Unit
from quant.spec import QuantSpec
from quant.timeline import Timeline

FREE = torch.full((1, 1), 1e6)  # no code is clipped


def quantized(layer, *, balanced=False, bits=4):
    quant = QuantLayer(
        tag("q", layer),
        QuantSpec(bits=bits, per="channel"),
        QuantSpec(),
        Timeline(),
        False,
        balanced,
    )
    return quant.requires_grad_(False)


def by_least_squares(weight, scale, hessian):
    """Round a column, then choose all later columns anew so that the error is least: what the
    factor does at once."""
    hessian = hessian + RIDGE * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)
    order, codes, error = (
        hessian.diagonal().argsort(descending=True),
        torch.empty_like(weight),
        None,
    )
    left = weight.clone()
    for i, j in enumerate(order):
        codes[:, j] = (left[:, j] / scale[:, j]).round()
        done, todo = order[: i + 1], order[i + 1 :]
        error = weight[:, done] - codes[:, done] * scale[:, done]
        # least over d of (error, d) H (error, d)^T, d = weight - what the later columns become
        best = -torch.linalg.solve(hessian[todo][:, todo], hessian[todo][:, done] @ error.T).T
        left[:, todo] = weight[:, todo] - best
    return codes


@pytest.mark.parametrize("width", [2, 12, 150])  # 150 columns are more than a block
def test_codes_are_those_of_least_squares_column_by_column(width):
    x = (normal(400, width) @ normal(width, width, seed=1)).double()
    weight, scale = (
        normal(5, width, seed=2).double(),
        0.3 + normal(5, 1, seed=3).abs().double().expand(5, width),
    )
    hessian = x.T @ x / len(x)
    limit = FREE.expand(5, width).double()
    found = optimal_codes(weight, scale, -limit, limit, hessian)
    assert torch.equal(found, by_least_squares(weight, scale, hessian))
    nearest = (weight / scale).round()
    lost = [float((x @ (weight - q * scale).T).square().mean()) for q in (found, nearest)]
    assert lost[0] < 0.8 * lost[1]


def test_without_correlation_it_is_rounding_to_nearest():
    weight, scale, limit = normal(5, 9), torch.full((5, 9), 0.2), FREE.expand(5, 9)
    found = optimal_codes(weight, scale, -limit, limit, torch.diag(normal(9).abs()))
    assert torch.equal(found, (weight / scale).round())


def test_codes_stay_in_their_range_and_inputs_that_never_come_do_no_harm():
    weight, scale = normal(5, 9), torch.full((5, 9), 0.05)
    found = optimal_codes(
        weight, scale, torch.full((5, 9), -3.0), torch.full((5, 9), 4.0), torch.zeros(9, 9)
    )
    assert torch.equal(found, (weight / scale).round().clamp(-3, 4))


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Linear(6, 5), (3, 6)),
        (nn.Linear(6, 5), (3, 7, 6)),
        (nn.Conv1d(6, 5, 1), (3, 6, 7)),
        (nn.Conv1d(6, 5, 3, padding=1), (3, 6, 7)),
        (nn.Conv2d(6, 5, 3, padding=1), (3, 6, 4, 5)),
        (nn.Conv2d(6, 5, (1, 3), stride=2, padding=(2, 1), dilation=(1, 2)), (3, 6, 8, 9)),
    ],
)
@pytest.mark.parametrize("balanced", [False, True])
def test_columns_times_the_flat_weight_are_the_layers_answer(layer, shape, balanced):
    quant, x = quantized(layer, balanced=balanced), normal(*shape)
    if balanced:
        quant.balance(0.5 + normal(6, seed=1).abs())
    quant.bias = None
    quant.weight_quantizer = None  # the answer of the weight as it is
    answer = quant(x)
    answer = answer.flatten(2).transpose(1, 2) if quant.trailing else answer
    torch.testing.assert_close(
        columns(quant, x) @ quant.weight.flatten(1).T, answer.reshape(-1, 5), rtol=1e-4, atol=1e-5
    )


def test_codes_of_a_unit_and_of_its_inner_layers_take_what_their_own_inputs_are():
    """The second layer's inputs are those behind the first layer in full precision."""
    first, second = quantized(nn.Conv2d(3, 6, 3, padding=1)), quantized(nn.Conv2d(6, 5, 1), bits=3)
    unit = Unit("x", nn.Sequential(first, second), torch.device("cpu"), lambda rows: None)
    for layer in (first, second):
        layer.fit_weight()
    x = normal(20, 3, 4, 4)
    codes = second_order_codes(unit, [first, second], [x], 20, torch.Generator().manual_seed(0))
    seen = columns(second, first.operation(x, first.weight, first.bias))
    q = second.weight_quantizer
    scale, zero = (v[0][:, None].expand(5, 6) for v in (q.scale, q.zero_point))
    expected = optimal_codes(
        second.weight.flatten(1), scale, q.low - zero, q.high - zero, seen.T @ seen / len(seen)
    )
    # sums in another order decide ties otherwise
    assert (codes[1].flatten(1) == expected).float().mean() > 0.95
    assert codes[0].shape == first.weight.shape and first.weight_quantizer.enabled
    assert not (first._forward_pre_hooks or second._forward_pre_hooks)


def test_rounding_begins_halfway_and_can_end_where_it_was_led():
    layer = quantized(nn.Linear(40, 6))
    layer.fit_weight()
    q = layer.weight_quantizer
    ratio, zero = layer.weight / q.table(q.scale, layer.weight), q.table(q.zero_point, layer.weight)
    start = (
        ratio.floor()
        + torch.randint(-2, 4, ratio.shape, generator=torch.Generator().manual_seed(0))
    ).clamp(q.low - zero, q.high - zero)
    rounding = Rounding(layer.weight, q, start)
    near = (ratio - start).abs() <= 1
    assert near.any() and not near.all()
    torch.testing.assert_close(
        (rounding.floor + rounding.h())[near], ((ratio + start) / 2)[near], atol=1e-4, rtol=0
    )
    assert ((rounding.floor + rounding.h() - start).abs() <= 1).all()
    rounding.alpha.data = torch.where(start > rounding.floor, 9.0, -9.0)
    assert torch.equal(rounding.codes(hard=True), start)

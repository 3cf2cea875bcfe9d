"""What can run on int8 by the specifications alone: known before anything is fitted, the same on
any processor."""

from typing import Any

from torch import nn

from quant.integer.grids import why_no_codes
from quant.layers import QuantLayer, QuantMatmul
from quant.rules import resolve, role_of
from quant.spec import QuantSpec

FLOAT = "not quantized"
PRODUCT = "products of activations run on int8 for large attention maps alone"


def why_as_defined(module: nn.Module) -> str:
    """Why a layer or product of a converted network stays as it is defined; "" if it can run on
    int8."""
    if isinstance(module, QuantMatmul):
        return PRODUCT
    if not isinstance(module, QuantLayer):
        return FLOAT
    quantizers = module.weight_quantizer, module.input_quantizer
    return _why(*(QuantSpec() if q is None else q.spec for q in quantizers))


def why_by_rules(net: nn.Module, rules: list[dict[str, Any]]) -> dict[str, str]:
    """The same of every layer of a float network that rules would convert: name -> reason, in
    registration order."""
    reasons = {}
    for name, module in net.named_modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            specs = resolve(rules, name, role_of(module), "layer")
            reasons[name] = _why(specs["weight"], specs["input"])
    return reasons


def _why(weight, inputs):
    if weight.bits >= 32:
        return FLOAT if inputs.bits >= 32 else "its weight is not quantized"
    return why_no_codes(inputs)

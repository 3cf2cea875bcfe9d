"""Turn a float network into a quantized one: ordered rules over module names and roles, modules
replaced by name.

A rule is a dict: `match` (glob on the module's name) and `role` (one or a list) say what it applies
to, `kind` (layer | matmul) narrows it; `weight`, `input` (keys of QuantSpec), `split` and `balance`
say how. Later rules win, key by key; bits 32 leaves a tensor alone. Parameterless attention
products follow the `input` of rules that match their name and operand role. What scales and shifts
a norm (role scale_shift) stays in floating point unless a rule names that role; it has a scale for
either half unless `split` is false."""

import copy
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from base.errors import unknown_word
from base.network import Matmul, Operand
from quant.layers import SWAP, QuantLayer, QuantMatmul, QuantOperand
from quant.network import QuantizedNet
from quant.rules import check_rules, resolve, role_of
from quant.timeline import Timeline


def convert(
    net: nn.Module, rules: list[dict[str, Any]], timeline: Timeline | None = None
) -> QuantizedNet:
    """A quantized copy of `net` (the float network is left as it is), unfitted; weights are shared
    until hardened. Its recipe holds the rules. Raises ValueError for rules that are none or that
    match no layer.

    >>> qnet = quant.convert(net, [{"weight": {"bits": 4, "per": "channel"}, "input": {"bits": 8}}])
    >>> qnet.net.stem.weight_quantizer
    Quantizer(bits=4, shape=(1, 4), range=minmax)
    """
    check_rules(rules)
    names = [name for name, module in net.named_modules() if type(module) in SWAP]
    for pattern in (rule.get("match", "*") for rule in rules):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(unknown_word(f"no layer matches '{pattern}'", pattern, names))
    timeline = timeline or Timeline()
    copied = copy.deepcopy(net, {id(p): p for p in net.parameters()})  # shared, not copied
    for name in names:
        module = _quantized(name, copied.get_submodule(name), rules, timeline)
        copied.set_submodule(name, module)
    quantized = QuantizedNet(copied, timeline).to(next(net.parameters()).device).eval()
    quantized.recipe = {"rules": list(rules)}
    return quantized


def _quantized(name, module, rules, timeline):
    """What stands in the place of a float module, which may be the module itself."""
    if isinstance(module, Matmul):
        specs = [resolve(rules, name, role, "matmul")["input"] for role in module.roles]
        on = any(spec.bits < 32 for spec in specs)
        return QuantMatmul(module, specs, timeline) if on else module
    facts = resolve(rules, name, role_of(module), "layer")
    weight, inputs, split = facts["weight"], facts["input"], facts["split"]
    if isinstance(module, Operand):
        return QuantOperand(module, inputs, timeline, split) if inputs.bits < 32 else module
    if weight.bits == inputs.bits == 32:
        return module
    return QuantLayer(module, weight, inputs, timeline, split, facts["balance"])

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

from base.errors import unknown_word
from base.network import Matmul, Operand
from quant.layers import SWAP, QuantLayer, QuantMatmul, QuantOperand
from quant.network import QuantizedNet
from quant.rules import check_rules, resolve
from quant.timeline import Timeline


def convert(net, rules, timeline=None):
    """A quantized copy of `net` (the float network is left as it is), unfitted; weights are shared
    until hardened.

    The copy reads the time of every forward pass."""
    check_rules(rules)
    names = [name for name, module in net.named_modules() if type(module) in SWAP]
    for rule in rules:
        if not any(fnmatchcase(name, rule.get("match", "*")) for name in names):
            raise ValueError(
                unknown_word(f"no layer matches '{rule['match']}'", rule["match"], names)
            )
    timeline = timeline or Timeline()
    parameters = {id(p): p for p in net.parameters()}  # shared, not copied
    net = copy.deepcopy(net, parameters)
    for name, module in list(net.named_modules()):
        if type(module) not in SWAP:
            continue
        if isinstance(module, Matmul):
            specs = [resolve(rules, name, role, "matmul")["input"] for role in module.roles]
            swapped = (
                QuantMatmul(module, specs, timeline) if any(s.bits < 32 for s in specs) else module
            )
        elif isinstance(module, Operand):
            facts = resolve(rules, name, module.role, "layer")
            on = facts["input"].bits < 32
            swapped = (
                QuantOperand(module, facts["input"], timeline, facts["split"]) if on else module
            )
        else:
            facts = resolve(rules, name, module.role, "layer")
            on = facts["weight"].bits < 32 or facts["input"].bits < 32
            swapped = (
                QuantLayer(
                    module,
                    facts["weight"],
                    facts["input"],
                    timeline,
                    facts["split"],
                    facts["balance"],
                )
                if on
                else module
            )
        net.set_submodule(name, swapped)
    return QuantizedNet(net, timeline).to(next(net.parameters()).device).eval()

"""Turn a float network into a quantized one: ordered rules over module names and roles, modules replaced by name.

A rule is a dict: `match` (glob on the module's name) and `role` (one or a list) say what it applies to, `kind` (layer |
matmul) narrows it; `weight`, `input` (keys of QuantSpec), `split` and `balance` say how. Later rules win, key by key;
bits 32 leaves a tensor alone. Parameterless attention products follow the `input` of rules that match their name and
operand role. What scales and shifts a norm (role scale_shift) stays in floating point unless a rule names that role;
it has a scale for either half unless `split` is false.
"""
import copy
from contextlib import contextmanager
from dataclasses import fields
from fnmatch import fnmatchcase

import torch

from ddim.unet import Matmul
from ldm.unet import Operand
from quant.config import unknown_word
from quant.layers import SWAP, QuantLayer, QuantMatmul, QuantOperand
from quant.quantizer import GRIDS, PER, Quantizer, QuantSpec
from quant.ranges import RANGES
from quant.timeline import Timeline

ROLES = ("stem", "out", "temb", "emb_proj", "conv1", "conv2", "skip", "down", "up", "q", "k", "v", "qkv", "probs",
         "proj", "proj_in", "ff", "scale_shift")
BY_NAME = ("scale_shift",)                 # roles that only rules which name them speak of
FOREIGN = {"weight": ("grid", "group_size", "segment_bits", "static"), "input": ("per_segment",)}    # the other part's
RULE_KEYS = ("match", "role", "kind", "weight", "input", "split", "balance")
BITS = (2, 3, 4, 5, 6, 7, 8, 32)


def check_bits(bits, what):
    """Raises ValueError for a width that cannot be stored or computed."""
    allowed = BITS + (16,) if what == "input" else BITS
    if bits not in allowed:
        raise ValueError(f"{what} bits {bits} are impossible; choose {', '.join(map(str, sorted(allowed)))} "
                         "(32 leaves the tensor in floating point)")


def check_rules(rules):
    """Raises ValueError for an unknown key of a rule or of its specifications."""
    for rule in rules:
        if not isinstance(rule, dict) or not all(isinstance(rule.get(p, {}), dict) for p in ("weight", "input")):
            raise ValueError(f"rule {rule} must be a mapping such as {{role: stem, weight: {{bits: 8}}}}")
        for key in rule:
            if key not in RULE_KEYS:
                raise ValueError(unknown_word(f"rule {dict(rule)} has an unknown key '{key}'", key, RULE_KEYS))
        for key, words in (("role", ROLES), ("kind", ("layer", "matmul"))):
            for word in listed(rule.get(key, words[0])):
                if word not in words:
                    complaint = f"rule {dict(rule)} has an unknown {key} '{word}'"
                    raise ValueError(unknown_word(complaint, str(word), words))
        for part, foreign in FOREIGN.items():
            facts, known = rule.get(part, {}), [f.name for f in fields(QuantSpec) if f.name not in foreign]
            for key, words in (("range", RANGES), ("grid", GRIDS), ("per", PER)):
                if facts.get(key, next(iter(words))) not in words:
                    raise ValueError(unknown_word(f"{key} '{facts[key]}' is unknown", facts[key], words))
            for key in facts:
                if key not in known:
                    complaint = f"{part} of rule {dict(rule)} has an unknown key '{key}'"
                    raise ValueError(unknown_word(complaint, key, known))
            check_bits(rule.get(part, {}).get("bits", 32), part)
        if rule.get("input", {}).get("grid") == "log2" and listed(rule.get("role")) != ["probs"]:
            raise ValueError(f"rule {dict(rule)} has grid log2, which is for softmax outputs, numbers in [0, 1]; give "
                             "it role: probs")


def listed(value):
    return value if isinstance(value, list) else [value]


def applies(rule, name, role, kind):
    """Whether a rule speaks of this layer or operand."""
    of_role = role in listed(rule["role"]) if "role" in rule else role not in BY_NAME
    return of_role and fnmatchcase(name, rule.get("match", "*")) and kind in listed(rule.get("kind", kind))


def resolve(rules, name, role, kind):
    """What the rules say of one layer or operand -> {"weight": QuantSpec, "input": QuantSpec, "split": bool, "balance":
    bool}."""
    merged = {"weight": {}, "input": {}, "split": True, "balance": False}
    for rule in rules:
        if applies(rule, name, role, kind):
            merged["weight"] |= rule.get("weight", {})
            merged["input"] |= rule.get("input", {})
            merged |= {key: rule[key] for key in ("split", "balance") if key in rule}
    return merged | {part: QuantSpec(**merged[part]) for part in ("weight", "input")}


def convert(net, rules, timeline=None):
    """A quantized copy of `net` (the float network is left as it is), unfitted; weights are shared until hardened.

    Returns the copy; its `timeline` follows the steps of every forward pass."""
    check_rules(rules)
    names = [name for name, module in net.named_modules() if type(module) in SWAP]
    for rule in rules:
        if not any(fnmatchcase(name, rule.get("match", "*")) for name in names):
            raise ValueError(unknown_word(f"no layer matches '{rule['match']}'", rule["match"], names))
    timeline = timeline or Timeline()
    parameters = {id(p): p for p in net.parameters()}      # shared, not copied
    net = copy.deepcopy(net, parameters)
    for name, module in list(net.named_modules()):
        if type(module) not in SWAP:
            continue
        if isinstance(module, Matmul):
            specs = [resolve(rules, name, role, "matmul")["input"] for role in module.roles]
            swapped = QuantMatmul(module, specs, timeline) if any(s.bits < 32 for s in specs) else module
        elif isinstance(module, Operand):
            facts = resolve(rules, name, module.role, "layer")
            on = facts["input"].bits < 32
            swapped = QuantOperand(module, facts["input"], timeline, facts["split"]) if on else module
        else:
            facts = resolve(rules, name, module.role, "layer")
            on = facts["weight"].bits < 32 or facts["input"].bits < 32
            swapped = QuantLayer(module, facts["weight"], facts["input"], timeline, facts["split"],
                                 facts["balance"]) if on else module
        net.set_submodule(name, swapped)
    timeline.follow(net)
    net.timeline = timeline
    return net.to(next(net.parameters()).device).eval()


def quant_layers(net):
    return {name: m for name, m in net.named_modules() if isinstance(m, QuantLayer)}


def input_quantizers(net):
    """name -> activation quantizer, in registration order."""
    return {name: m for name, m in net.named_modules()
            if isinstance(m, Quantizer) and not name.endswith("weight_quantizer")}


@contextmanager
def in_full_precision(net):
    """Without any of its quantizers, fitted or not, for a while; what balances channels stays."""
    quantizers = [module for module in net.modules() if isinstance(module, Quantizer)]
    for q in quantizers:
        q.enabled = False
    try:
        yield
    finally:
        for q in quantizers:
            q.enabled = True


def set_input_quantization(net, enabled):
    for quantizer in input_quantizers(net).values():
        quantizer.enabled = enabled


def quantization_map(net, quantized, macs, times=(0,)):
    """What is quantized: a row per layer in execution order and the share of parameters and of multiply-adds whose
    weight (for attention products: both operands) is below 32 bits. Widths of an activation that differ by time are
    given as their mean over `times`, the network times of the sampler; `bit_product`, the two widths of a multiply-add
    multiplied, is a mean likewise."""
    rows, modules, floats = [], dict(quantized.named_modules()), dict(net.named_modules())
    times = torch.tensor(times, dtype=torch.float32)
    for name, count in macs.items():
        module, source = modules[name], floats[name]
        product = isinstance(source, Matmul)
        widths = [bits_at(getattr(module, f"{part}_quantizer", None), times)
                  for part in (("a", "b") if product else ("weight", "input"))]
        first, second = map(mean, widths)
        row = {"name": name, "macs": count, "bit_product": mean(widths[0] * widths[1])}
        if product:
            rows.append(row | {"role": "+".join(source.roles), "kind": "matmul", "weight_bits": None,
                               "input_bits": [first, second], "params": 0, "quantized": max(first, second) < 32})
        else:
            rows.append(row | {"role": source.role, "kind": type(source).__name__, "weight_bits": first,
                               "input_bits": second, "params": sum(p.numel() for p in source.parameters()),
                               "quantized": first < 32})
    total = sum(p.numel() for p in net.parameters())
    weights = sum(dict(floats[r["name"]].named_parameters())["weight"].numel() for r in rows
                  if r["quantized"] and r["kind"] != "matmul")
    total_macs = sum(macs.values())
    return {"layers": rows, "params_share": weights / total,
            "macs_share": sum(r["macs"] for r in rows if r["quantized"]) / total_macs}


def bits_at(quantizer, times):
    """Widths (T,) of a quantizer, or 32 for None, at network times (T,)."""
    widths = torch.tensor([32] if quantizer is None else quantizer.bits, dtype=torch.float64)
    return (widths[quantizer.timeline.segments_of(times)] if len(widths) > 1 else widths).expand(len(times))


def mean(values):
    """Mean as an int where it is whole."""
    value = values.mean().item()
    return int(value) if value.is_integer() else value


def format_map(facts):
    """The map as text."""
    lines = [f"{'layer':32} {'role':11} {'W':>3} {'A':>6} {'params':>10} {'M mult-adds':>12}"]
    for row in facts["layers"]:
        bits = "/".join(f"{b:.3g}" for b in listed(row["input_bits"]))
        lines.append(f"{row['name']:32} {row['role']:11} {row['weight_bits'] if row['params'] else '-':>3} {bits!s:>6} "
                     f"{row['params']:>10,} {row['macs'] / 1e6:>12.2f}")
    lines.append(f"quantized: {facts['params_share']:.2%} of the parameters, {facts['macs_share']:.2%} of the "
                 "multiply-adds")
    return "\n".join(lines)

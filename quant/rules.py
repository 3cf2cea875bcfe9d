"""Ordered rules over module names and roles: what is quantized, and how."""

from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from base.errors import unknown_word
from base.network import ROLES
from quant.ranges import RANGES
from quant.spec import GRIDS, PER, QuantSpec

BY_NAME = ("scale_shift",)  # roles that only rules which name them speak of
# the other part's
FOREIGN = {"weight": ("grid", "group_size", "segment_bits", "static"), "input": ("per_segment",)}
RULE_KEYS = ("match", "role", "kind", "weight", "input", "split", "balance")
BITS = (2, 3, 4, 5, 6, 7, 8, 32)


def check_bits(bits: Any, what: str) -> None:
    """Raises ValueError for a width that cannot be stored or computed."""
    allowed = BITS + (16,) if what == "input" else BITS
    if bits not in allowed or not isinstance(bits, int):
        raise ValueError(
            f"{what} bits {bits} are impossible; choose {', '.join(map(str, sorted(allowed)))} "
            "(32 leaves the tensor in floating point)"
        )


def check_rules(rules: list[dict[str, Any]]) -> None:
    """Raises ValueError for an unknown key of a rule or of its specifications."""
    for rule in rules:
        is_dict = isinstance(rule, dict)
        if not is_dict or not all(isinstance(rule.get(part, {}), dict) for part in FOREIGN):
            raise ValueError(
                f"rule {rule} must be a mapping such as {{role: stem, weight: {{bits: 8}}}}"
            )
        _check_words(f"rule {dict(rule)} has an unknown key", rule, RULE_KEYS)
        if not isinstance(rule.get("match", ""), str):
            raise ValueError(f"match of rule {dict(rule)} must be one pattern, such as 'down.*.q'")
        for key, words in (("role", ROLES), ("kind", ("layer", "matmul"))):
            _check_words(
                f"rule {dict(rule)} has an unknown {key}", listed(rule.get(key, [])), words
            )
        for part, foreign in FOREIGN.items():
            facts = rule.get(part, {})
            known = [f.name for f in fields(QuantSpec) if f.name not in foreign]
            for key, words in (("range", RANGES), ("grid", GRIDS), ("per", PER)):
                if key in facts and facts[key] not in tuple(words):
                    complaint = f"{key} '{facts[key]}' is unknown"
                    raise ValueError(unknown_word(complaint, str(facts[key]), words))
            _check_words(f"{part} of rule {dict(rule)} has an unknown key", facts, known)
            check_bits(facts.get("bits", 32), part)
        if rule.get("input", {}).get("grid") == "log2" and listed(rule.get("role")) != ["probs"]:
            raise ValueError(
                f"rule {dict(rule)} has grid log2, which is for softmax outputs, numbers in [0, "
                "1]; give it role: probs"
            )


def _check_words(complaint, words, known):
    for word in words:
        if word not in known:
            raise ValueError(unknown_word(f"{complaint} '{word}'", str(word), known))


def listed(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]


def role_of(layer: nn.Module) -> str:
    """The role of a layer, "" if it has none: then rules that name no role speak of it."""
    return getattr(layer, "role", "")


def rule_for(name: str, role: str, kind: str) -> dict[str, str]:
    """The head of a rule that speaks of this layer or operand alone."""
    return {"match": name, "kind": kind} | ({"role": role} if role else {})


def applies(rule: dict[str, Any], name: str, role: str, kind: str) -> bool:
    """Whether a rule speaks of this layer or operand."""
    of_role = role in listed(rule["role"]) if "role" in rule else role not in BY_NAME
    of_kind = kind in listed(rule.get("kind", kind))
    return of_role and of_kind and fnmatchcase(name, rule.get("match", "*"))


def resolve(rules: list[dict[str, Any]], name: str, role: str, kind: str) -> dict[str, Any]:
    """What the rules say of one layer or operand -> {"weight": QuantSpec, "input": QuantSpec,
    "split": bool, "balance": bool}."""
    merged = {"weight": {}, "input": {}, "split": True, "balance": False}
    for rule in rules:
        if applies(rule, name, role, kind):
            merged["weight"] |= rule.get("weight", {})
            merged["input"] |= rule.get("input", {})
            merged |= {key: rule[key] for key in ("split", "balance") if key in rule}
    return merged | {part: QuantSpec(**merged[part]) for part in ("weight", "input")}

"""The generated table of docs/integer.md: what of every method runs on int8."""

from typing import Any

import torch
from torch import nn

from base.config import load
from base.files import PROJECT
from models.zoo import build_network
from quant.integer.support import why_by_rules
from quant.rules import role_of
from tinydm.recipe import RunConfig
from tinydm.report.reference import method_names
from tinydm.report.table import lines_of

MODELS = "cifar10-compact", "latent-compact", "latent-compact-class"
BITS = "w4a8"


def integers_block() -> list[str]:
    """A row for each method: how many layers of the models that ship run on int8, and why the
    others do not, which are named by their roles."""
    nets, rows = [network_of(model) for model in MODELS], []
    for method in method_names():
        rules, counts, kept = rules_of(BITS, method), [], {}
        for net in nets:
            reasons = why_by_rules(net, rules)
            counts.append(f"{sum(not why for why in reasons.values())} of {len(reasons)}")
            for name, why in reasons.items():
                if why:
                    kept.setdefault(why, {})[role_of(net.get_submodule(name))] = None
        clauses = [f"{', '.join(roles)}: {why}" for why, roles in kept.items()]
        rows.append([f"[`{method}`](methods.md#{method})", *counts, "; ".join(clauses) or "–"])
    return lines_of(["`METHOD`", *MODELS, "what stays as defined, and why"], rows)


def network_of(model: str) -> nn.Module:
    """The network of a model by its shapes alone, without weights."""
    config = load(RunConfig, [PROJECT / f"configs/model/{model}.yaml"])
    with torch.device("meta"):
        return build_network(**config.network)


def rules_of(bits: str, method: str) -> list[dict[str, Any]]:
    """The rules of a method at some widths."""
    names = f"bits/{bits}", f"method/{method}", "preset/demo"
    return load(RunConfig, [PROJECT / f"configs/{name}.yaml" for name in names]).all_rules

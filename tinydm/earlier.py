"""What recipes of earlier versions say otherwise: those in run folders, in quantized files, in
results files, and YAMLs of users."""

from typing import Any

# `effort` and passes of this project said `bfloat16`: true or false, before they said `dtype`
DTYPES = {True: "bf16", False: "fp32"}
# options of passes in earlier versions, which decided nothing
RETIRED = ("memory_gb",)


def renewed(recipe: dict[str, Any]) -> dict[str, Any]:
    """Says a recipe, or the part of one that a file has, in today's words: without options that
    passes no longer have. What is new already stays."""
    learning = {key: _learning(recipe[key]) for key in ("effort", "pass_options") if key in recipe}
    passes = {"passes": _learning(recipe["passes"], RETIRED)} if "passes" in recipe else {}
    return recipe | learning | passes


def _learning(tree, retired=()):
    """Renews options; a pass from elsewhere, whose name has a dot, has options of its own."""
    if isinstance(tree, list):
        return [_learning(item, retired) for item in tree]
    if not isinstance(tree, dict):
        return tree
    found = {}
    for key, value in tree.items():
        if key == "bfloat16":
            found["dtype"] = DTYPES.get(value, value)
        elif key not in retired:
            found[key] = value if "." in str(key) else _learning(value, retired)
    return found

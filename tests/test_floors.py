"""Rooms stand on each other: imports go downwards only, and in no circle."""

import ast
from graphlib import TopologicalSorter

import pytest

from base.files import PROJECT

# a room -> the rooms that it may use, beside itself
FLOORS = {
    "base": [],
    "ddim": ["base"],
    "ldm": ["base", "ddim"],
    "quant": ["base"],
    "models": ["base", "ddim", "ldm"],
    "evaluation": ["base", "ddim", "ldm", "models"],
    "tinydm": ["base", "ddim", "ldm", "quant", "models", "evaluation"],
    "scripts": ["base", "ddim", "ldm", "quant", "models", "evaluation", "tinydm"],
}
# modules of quant, each standing on those above it only
QUANT = [
    ["groups", "grid", "spec", "timeline", "packing"],
    ["ranges", "quantizer"],
    ["observer", "rules"],
    ["layers"],
    ["network", "graph"],
    ["scales", "folds", "convert", "analysis"],
    ["checkpoint"],
    ["calibration", "reconstruction", "integer", "export"],
    ["passes", "inventory"],
    ["qat"],
]
# of quant/passes, what is no pass
MACHINERY = {f"quant.passes.{name}" for name in ("declare", "find", "job", "order", "run")}
MODULES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts).removesuffix(".__init__"): path
    for room in FLOORS
    for path in sorted((PROJECT / room).rglob("*.py"))
}


def imports(name, *, running=True):
    """The modules that a module imports anywhere in it, of ours by the longest name there is; for
    types alone too unless they are only wanted when `running`."""
    found = set()
    for node in walk(ast.parse(MODULES[name].read_text()), running):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (below & MODULES.keys()) or {node.module}
    return found


def walk(node, running):
    if running and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from walk(child, running)


@pytest.mark.parametrize("room", FLOORS)
def test_a_room_uses_those_below_it_alone(room):
    for name in (name for name in MODULES if name.split(".")[0] == room):
        rooms = {used.split(".")[0] for used in imports(name, running=False)} & FLOORS.keys()
        forbidden = rooms - {room, *FLOORS[room]}
        assert not forbidden, f"{name} imports {', '.join(forbidden)}"


def test_modules_import_each_other_in_no_circle():
    graph = {name: imports(name) & MODULES.keys() - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_inside_quant_every_module_stands_on_those_below_it():
    rank = {part: i for i, row in enumerate(QUANT) for part in row}
    for name in (name for name in MODULES if name.startswith("quant.")):
        part = name.split(".")[1]
        assert part in rank, f"give quant/{part} its place in QUANT"
        used = {m.split(".")[1] for m in imports(name) if m.startswith("quant.")}
        above = {other for other in used if rank[other] > rank[part]}
        assert not above, f"{name} imports {', '.join(above)}, which stand above it"


def test_a_pass_imports_no_other_pass():
    passes = {name for name in MODULES if name.startswith("quant.passes.")} - MACHINERY
    for name in passes:
        others = imports(name) & passes
        assert not others, f"{name} imports {', '.join(others)}"


def test_lightning_stays_in_the_room_of_training():
    users = {name for name in MODULES if "pytorch_lightning" in imports(name, running=False)}
    assert users and all(name.startswith("tinydm.training.") for name in users)

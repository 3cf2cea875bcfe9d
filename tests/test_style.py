"""The house style as far as a machine can tell: lengths, annotations, no global changes."""

import ast
import re

import pytest

from base.files import PROJECT

ROOMS = ("base", "ddim", "ldm", "models", "quant", "evaluation", "tinydm")
LIBRARY = sorted(path for room in ROOMS for path in (PROJECT / room).rglob("*.py"))
TESTS = sorted((PROJECT / "tests").rglob("*.py"))
LONGEST = 300  # lines of a file
MODULES_OF_QUANT = 20  # beside its rooms
# calls that change what the process does elsewhere
GLOBAL_CALLS = re.compile(
    r"matplotlib\.use|(np|numpy|torch|random)(\.random)?\.(manual_)?seed|torch\.(cuda\.)?set_\w+"
    r"|torch\.use_\w+|torch\.backends\..*|warnings\.\w*(filter)\w*|logging\.basicConfig"
    r"|.*\.(setLevel|addHandler)|os\.environ\..*|sys\.path\..*"
)
GLOBAL_PLACES = re.compile(r"torch\.backends\..*|os\.environ.*|sys\..*|matplotlib\..*")


def name_of(path):
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize("path", [*LIBRARY, *TESTS], ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= LONGEST


def test_quant_is_no_hall_of_doors():
    assert len(list((PROJECT / "quant").glob("*.py"))) <= MODULES_OF_QUANT


def public_functions(body):
    """Of a module and its public classes."""
    for node in body:
        if getattr(node, "name", "_").startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield from public_functions(node.body)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_public_functions_are_annotated(path):
    bare = []
    for function in public_functions(ast.parse(path.read_text()).body):
        a = function.args
        parameters = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        for p in parameters:
            if p is not None and p.annotation is None and p.arg not in ("self", "cls"):
                bare.append(f"{function.name}({p.arg})")
        if function.returns is None:
            bare.append(f"{function.name} ->")
    assert not bare, ", ".join(bare)


def global_changes(source):
    """Calls and assignments, at import or in a constructor, that other code would notice."""
    tree = ast.parse(source)
    for node in running_code(tree.body):
        if isinstance(node, ast.Call) and GLOBAL_CALLS.fullmatch(ast.unparse(node.func)):
            yield ast.unparse(node)
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = getattr(node, "targets", None) or [node.target]
            yield from (
                ast.unparse(part)
                for target in targets
                for part in getattr(target, "elts", [target])
                if GLOBAL_PLACES.fullmatch(ast.unparse(part))
            )
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and "pyplot" in ast.unparse(node):
            yield ast.unparse(node)


def running_code(body):
    """The nodes that run when a module is imported or an object of its classes made."""
    for node in body:
        constructor = getattr(node, "name", "") in ("__init__", "__post_init__", "__new__")
        if (
            isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            and not constructor
        ):
            continue
        yield node
        yield from running_code(ast.iter_child_nodes(node))


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_importing_and_making_objects_changes_nothing_global(path):
    assert not list(global_changes(path.read_text()))


@pytest.mark.parametrize(
    "source, found",
    [
        ("import matplotlib\nmatplotlib.use('Agg')", ["matplotlib.use('Agg')"]),
        ("if x:\n  torch.set_num_threads(2)", ["torch.set_num_threads(2)"]),
        (
            "class A:\n  def __init__(self):\n    torch.backends.cudnn.allow_tf32 = False",
            ["torch.backends.cudnn.allow_tf32"],
        ),
        ("def f():\n  from matplotlib import pyplot", ["from matplotlib import pyplot"]),
        ("a, os.environ['X'] = 1, '2'", ["os.environ['X']"]),
        ("def f():\n  torch.set_num_threads(2)", []),
        ("f = lambda: torch.set_num_threads(2)", []),
    ],
)
def test_global_changes_are_found(source, found):
    assert list(global_changes(source)) == found

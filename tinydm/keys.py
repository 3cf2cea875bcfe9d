"""Every key of a configuration with its type, its default and its comment in the source."""

import ast
import inspect
import io
import tokenize
from dataclasses import MISSING, Field, fields, is_dataclass
from textwrap import dedent, wrap
from typing import Any

import yaml

WIDTH = 100  # columns of a help text


def describe_keys(schema: type, prefix: str = "") -> list[tuple[str, str, Any, str]]:
    """(dotted key, type, default, comment above and beside it) of every field of a dataclass in its
    order; a field that is a dataclass itself stands for its own fields."""
    types, comments = _source_of(schema)
    rows = []
    for field in fields(schema):
        default = _default(field)
        name = prefix + field.name
        if is_dataclass(default):
            rows += describe_keys(type(default), f"{name}.")
        else:
            rows.append((name, types[field.name], default, comments[field.name]))
    return rows


def show_keys(schema: type) -> str:
    """The keys of a schema as text, one a line: key=default and the comment."""
    rows = [(f"{key}={show(value)}", comment) for key, _, value, comment in describe_keys(schema)]
    column = 36
    lines = []
    for word, comment in rows:
        first, *more = wrap(comment, WIDTH - column - 4) or [""]
        if len(word) > column and first:  # a long default has a line of its own
            lines.append(f"  {word}")
            word = ""
        lines.append(f"  {word:{column}}  {first}".rstrip())
        lines += [" " * (column + 4) + line for line in more]
    return "\n".join(lines)


def show(value: Any) -> str:
    """A default as YAML and the command line write it."""
    if value == "":
        return ""
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _source_of(schema: type) -> tuple[dict[str, str], dict[str, str]]:
    """{field: annotation} and {field: comment} of a dataclass and its bases."""
    types, comments = {}, {}
    for part in reversed(schema.__mro__):
        if not is_dataclass(part):
            continue
        source = dedent(inspect.getsource(part))
        lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        found = [token for token in tokens if token.type == tokenize.COMMENT]
        said = {token.start[0]: token.string.strip("# ") for token in found}
        for node in ast.parse(source).body[0].body:
            if not isinstance(node, ast.AnnAssign):
                continue
            above = node.lineno
            while lines[above - 2].lstrip().startswith("#"):
                above -= 1
            numbers = range(above, node.end_lineno + 1)
            types[node.target.id] = ast.unparse(node.annotation)
            comments[node.target.id] = " ".join(said[n] for n in numbers if n in said)
    return types, comments

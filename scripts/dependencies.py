"""Which dependencies of pyproject.toml does this Python lack?  python scripts/dependencies.py

Prints the requirements that are absent or too old, one a line, and exits with 1 if there are any.
It reads installed metadata only, so it takes a fraction of a second and runs in a Python that has
none of them."""

import operator
import re
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT_FILE = Path(__file__).resolve().parents[1] / "pyproject.toml"
LISTS = ("dependencies", "test")  # what the tests need is installed too
COMPARE = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}


def requirements(text: str) -> list[str]:
    """The quoted entries of the lists named in LISTS (the standard TOML reader came with Python
    3.11 only)."""
    found = []
    for name in LISTS:
        body = re.search(rf"^{name} = \[(.*?)\]", text, re.MULTILINE | re.DOTALL).group(1)
        found += re.findall(r'"([^"]+)"', body)
    return found


def numbers(text: str) -> tuple[int, ...]:
    """Release numbers of a version without trailing zeros, so that 2.11 equals 2.11.0+cpu."""
    release = re.match(r"\d+(\.\d+)*", text).group()
    return tuple(int(n) for n in re.sub(r"(\.0)+$", "", release).split("."))


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def is_met(requirement: str, version_of: Callable[[str], str | None] = installed) -> bool:
    """Whether a requirement such as torch>=2.11,!=2.13.0 holds."""
    name, conditions = re.fullmatch(r"([\w.-]+)(.*)", requirement).groups()
    found = version_of(name)
    return found is not None and all(
        COMPARE[sign](numbers(found), numbers(wanted))
        for sign, wanted in re.findall(r"([<>=!]+)([\w.]+)", conditions)
    )


if __name__ == "__main__":
    missing = [r for r in requirements(PROJECT_FILE.read_text()) if not is_met(r)]
    print("\n".join(missing))
    sys.exit(1 if missing else 0)

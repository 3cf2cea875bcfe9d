"""The packages of the extra `export`."""

from importlib.util import find_spec


def is_here(package: str) -> bool:
    """Whether a package is installed."""
    return find_spec(package) is not None


def needed(*packages: str) -> None:
    """Raises ValueError that says how to get those that are not."""
    missing = [package for package in packages if not is_here(package)]
    if missing:
        raise ValueError(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; get what "
            "exports need with: pip install 'tinydm[export]'"
        )

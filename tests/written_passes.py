"""Passes that are written into the folder of passes during a test."""

import importlib
import sys

import pytest

from quant import passes


@pytest.fixture
def write_pass(tmp_path_factory, monkeypatch):
    """-> write_pass(name, source): as if NAME.py lay in quant/passes."""
    folder, names = tmp_path_factory.mktemp("passes"), []
    monkeypatch.setattr(passes, "__path__", [*passes.__path__, str(folder)])

    def write(name, source):
        (folder / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        names.append(name)

    yield write
    for name in names:
        sys.modules.pop(f"quant.passes.{name}", None)
        vars(passes).pop(name, None)

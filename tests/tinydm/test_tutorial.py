"""docs/tutorial.ipynb runs from its first cell to its last, on a tiny model; it is kept without
outputs."""

import nbformat
import pytest
from nbclient import NotebookClient
from test_face import FEW, tiny  # noqa: F401 (a fixture)

from base.files import PROJECT

PATH = PROJECT / "docs/tutorial.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def test_it_is_kept_without_outputs(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    assert PATH.stat().st_size < 20_000


def test_it_runs(notebook, tiny, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("TUTORIAL_MODEL", tiny)
    monkeypatch.setenv("TUTORIAL_NUM", "3")
    monkeypatch.setenv("TUTORIAL_WORDS", " ".join(FEW))
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": tmp_path}})
    client.execute()
    said = [str(output) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("'count': 3" in output for output in said)
    assert any("image/png" in output for output in said)
    assert (tmp_path / "learned.safetensors").exists()

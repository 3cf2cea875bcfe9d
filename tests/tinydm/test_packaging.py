"""What `pip install .` brings: every module, configuration, template and weight of the clone."""

import ast
import re
import runpy
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from base.files import PROJECT
from models.diffusion import find_checkpoint
from scripts.dependencies import requirements

PYPROJECT = (PROJECT / "pyproject.toml").read_text()

CONTENTS = """
from pathlib import Path
from setuptools.dist import Distribution

distribution = Distribution({"script_name": "setup.py"})
distribution.parse_config_files(["pyproject.toml"])
distribution.include_package_data = False
command = distribution.get_command_obj("build_py")
command.ensure_finalized()
for path in command.get_outputs(include_bytecode=False):
    print(Path(path).relative_to(command.build_lib).as_posix())
"""
# folders of the clone that an installed copy has as well
INSTALLED = ("base", "configs", "ddim", "evaluation", "ldm", "models", "quant", "tinydm")


def output(*words):
    ended = subprocess.run(words, cwd=PROJECT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split("\n")) - {""}


def test_everything_that_the_code_reads_is_installed_with_it():
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 or newer is needed")
    if not (PROJECT / ".git").exists():
        pytest.skip("no clone: git says what belongs to the project")
    tracked = output("git", "ls-files", "--cached", "--others", "--exclude-standard", *INSTALLED)
    packed = output(sys.executable, "-c", CONTENTS)
    assert tracked - packed == set()
    assert "models/weights/cifar10-compact.safetensors" in packed
    assert "configs/model/cifar10-compact.yaml" in packed and "scripts/sample.py" in packed
    foreign = ("tests", "runs", "results", "models/checkpoints/", "models/ldm/", "docs")
    assert not [path for path in packed if path.startswith(foreign)]


def test_the_console_script_is_the_command_line():
    from tinydm import cli

    assert 'tinydm = "tinydm.cli:main"' in PYPROJECT and callable(cli.main)


def third_party(path):
    """Packages that a module imports, ours and those of Python left out."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    modules = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    modules += [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    found = {module.split(".")[0] for module in modules}
    return found - sys.stdlib_module_names - set(INSTALLED)


def test_every_dependency_that_code_imports_is_named():
    extras = re.findall(r"^(?:text|export) = \[(.*?)\]", PYPROJECT, re.M)
    listed = [*requirements(PYPROJECT), *re.findall(r'"([^"]+)"', " ".join(extras))]
    named = {plain(re.match(r"[\w-]+", entry).group()) for entry in listed}
    distributions = packages_distributions()
    for path in (path for room in INSTALLED for path in (PROJECT / room).rglob("*.py")):
        for package in third_party(path) - {"triton"}:  # comes with PyTorch for GPUs
            sources = {plain(name) for name in distributions.get(package, [package])}
            assert sources & named, f"{path} imports {package}, which pyproject.toml does not name"


def plain(name):
    return name.lower().replace("_", "-")


def test_an_installed_copy_keeps_checkpoints_in_the_current_folder(tmp_path, monkeypatch):
    """It may stand where nobody can write, and an update would take them away."""
    source = PROJECT / "models/download.py"
    copy = tmp_path / "site-packages/models/download.py"
    copy.parent.mkdir(parents=True)
    for name in ("download.py", "checkpoints.json"):
        copy.with_name(name).write_bytes(source.with_name(name).read_bytes())
    folders = [runpy.run_path(str(path))["FOLDER"] for path in (source, copy)]
    assert folders == [PROJECT / "models", Path("models")]
    monkeypatch.chdir(tmp_path)
    place = Path("models/checkpoints/x.ckpt")
    place.parent.mkdir(parents=True)
    place.touch()
    assert find_checkpoint({"name": "x", "checkpoint": str(place)}) == tmp_path / place


def test_the_citation_and_the_changes_name_the_version():
    version = re.search(r'^version = "(.*)"', PYPROJECT, re.M).group(1)
    citation = yaml.safe_load((PROJECT / "CITATION.cff").read_text())
    changes = (PROJECT / "CHANGELOG.md").read_text()
    assert citation["version"] == version and citation["cff-version"] == "1.2.0"
    assert re.search(r"^## (\S+?),? ", changes, re.M).group(1) == version

"""scripts/setup.sh finds or makes a Python with all dependencies; installs are played by a stub,
nothing is fetched."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.dependencies import is_met, numbers, requirements

ROOT = Path(__file__).resolve().parents[2]


def test_requirements_are_read_from_the_project_file():
    found = requirements((ROOT / "pyproject.toml").read_text())
    assert {"torch>=2.11,!=2.13.0", "safetensors", "pytest"} <= set(found)
    assert not any("setuptools" in r for r in found)


@pytest.mark.parametrize(
    "requirement, version, met",
    [
        ("torch>=2.11,!=2.13.0", "2.11.0", True),
        ("torch>=2.11,!=2.13.0", "2.13.0+cpu", False),
        ("torch>=2.11,!=2.13.0", "2.9.1", False),
        ("torch>=2.11,!=2.13.0", "2.15.0rc1", True),
        ("torch>=2.11", "3", True),
        ("numpy", "1.0", True),
        ("numpy", None, False),
        ("x<2", "1.9", True),
        ("x<=2", "2.0", True),
    ],
)
def test_versions(requirement, version, met):
    assert is_met(requirement, lambda name: version) is met


def test_version_numbers():
    assert numbers("2.11.0+cpu") == numbers("2.11") == (2, 11) and numbers("2.10") == (2, 10)


@pytest.fixture
def project(tmp_path):
    """A project of its own that depends on pytest alone."""
    (tmp_path / "scripts").mkdir()
    for name in ("setup.sh", "dependencies.py"):
        (tmp_path / "scripts" / name).write_text((ROOT / "scripts" / name).read_text())
    (tmp_path / "pyproject.toml").write_text('dependencies = ["pytest"]\ntest = []\n')
    return tmp_path


def source(project):
    """Source setup.sh as a script would, with the project's bin/ first on the PATH."""
    command = f"set -euo pipefail; source {project}/scripts/setup.sh; echo PYTHON=$PYTHON"
    path = f"{project / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )


def fake_python(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


# A python that has nothing; as a virtual environment is made with it, the new one has all once pip
# has run.
BARE = """case "$1 $2" in
  "-c "*) echo "$0" ;;
  "-m venv") mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; echo venv >> "$3/log" ;;
  "-m pip") folder="$(dirname "$0")/.."; echo pip >> "$folder/log"
            [ ! -e "$folder/../no-network" ] && touch "$folder/has-all" ;;
  "-m uv") exit 1 ;;
  *) [ -e "$(dirname "$0")/../has-all" ] || { echo missing; exit 1; } ;;
esac"""


@pytest.fixture
def bare_project(project):
    for name in ("python", "python3"):
        fake_python(project / "bin" / name, BARE)
    return project


def test_current_python_is_used_where_it_has_everything(project):
    fake_python(project / "bin/python", f'exec {sys.executable} "$@"')
    ended = source(project)
    assert ended.returncode == 0 and ended.stdout == f"PYTHON={sys.executable}\n"
    assert not (project / ".venv").exists()


def test_dependencies_are_installed_once_into_the_project(bare_project):
    ended = source(bare_project)
    assert ended.returncode == 0 and f"PYTHON={bare_project}/.venv/bin/python" in ended.stdout
    assert "installing the dependencies" in ended.stdout and "installed in" in ended.stdout
    assert (bare_project / ".venv/requirements.txt").read_text() == "missing\n"
    log = (bare_project / ".venv/log").read_text()
    assert source(bare_project).stdout == f"PYTHON={bare_project}/.venv/bin/python\n"
    assert (bare_project / ".venv/log").read_text() == log


def test_install_that_was_cut_off_is_made_anew(bare_project):
    source(bare_project)
    (bare_project / ".venv/tinydm-setup").write_text("installing\n")
    (bare_project / ".venv/debris").touch()
    ended = source(bare_project)
    assert (
        ended.returncode == 0
        and "installed in" in ended.stdout
        and not (bare_project / ".venv/debris").exists()
    )


def test_failed_install_says_so_and_is_repeated(bare_project):
    (bare_project / "no-network").touch()
    ended = source(bare_project)
    assert (
        ended.returncode == 2
        and "could not be installed" in ended.stderr
        and "PYTHON=" not in ended.stdout
    )
    (bare_project / "no-network").unlink()
    assert source(bare_project).returncode == 0


def test_an_environment_of_the_users_own_is_left_alone(bare_project):
    fake_python(bare_project / ".venv/bin/python", BARE)
    ended = source(bare_project)
    assert ended.returncode == 2 and "was not made by this project" in ended.stderr
    assert (bare_project / ".venv/bin/python").exists()
    (bare_project / ".venv/has-all").touch()
    assert source(bare_project).stdout == f"PYTHON={bare_project}/.venv/bin/python\n"


def test_python_without_venv(bare_project):
    for name in ("python", "python3"):
        fake_python(bare_project / "bin" / name, f'[ "$1 $2" = "-m venv" ] && exit 1\n{BARE}')
    ended = source(bare_project)
    assert (
        ended.returncode == 2
        and "cannot make a virtual environment; install its venv package" in ended.stderr
    )


def test_old_python(bare_project):
    for name in ("python", "python3"):
        # prints no path: the version is too low
        fake_python(bare_project / "bin" / name, "exit 0")
    ended = source(bare_project)
    assert ended.returncode == 2 and ended.stderr == (
        "error: no Python 3.10 or newer is on the PATH as python or "
        "python3; install one and run this again\n"
    )

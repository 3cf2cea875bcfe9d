"""The command line: words, names of configurations, keys in the help, thin scripts."""

import importlib
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from base.files import PROJECT
from tinydm import cli
from tinydm.keys import describe_keys, show
from tinydm.names import find_yaml, known_names


@dataclass
class Inner:
    rate: float = 1e-3  # of learning


@dataclass
class Schema:
    """Not a comment."""

    name: str = ""
    # above,
    # in two lines
    width: int | None = None  # and beside
    inner: Inner = field(default_factory=Inner)
    rules: list[Any] = field(default_factory=list)  # a = [1]  # twice

    def method(self):
        local: int = 3  # not a key
        return local


def test_keys_of_a_schema_with_type_default_and_comment():
    assert describe_keys(Schema) == [
        ("name", "str", "", ""),
        ("width", "int | None", None, "above, in two lines and beside"),
        ("inner.rate", "float", 0.001, "of learning"),
        ("rules", "list[Any]", [], "a = [1]  # twice"),
    ]


@pytest.mark.parametrize(
    "value, text",
    [("", ""), ("ddim", "ddim"), (True, "true"), (None, "null"), (0.001, "0.001"), ([], "[]")],
)
def test_defaults_look_as_the_command_line_takes_them(value, text):
    assert show(value) == text


def test_overview_has_every_command(capsys):
    cli.main([])
    printed = capsys.readouterr().out
    assert all(f"\n  {word} " in printed for word in cli.COMMANDS)


@pytest.mark.parametrize("word", cli.COMMANDS)
def test_help_says_what_a_command_does_and_lists_its_keys(word, capsys):
    cli.main([*word.split(), "--help"])
    printed, command = capsys.readouterr().out, cli.COMMANDS[word]
    module = importlib.import_module(command.module)
    assert callable(module.run) and printed.startswith(module.__doc__.strip().split("\n")[0])
    if not command.schema:
        return
    schema = getattr(
        importlib.import_module(command.schema.rpartition(".")[0]),
        "".join(command.schema.rpartition(".")[2:]),
    )
    for key, _, default, _ in describe_keys(schema):
        assert f"  {key}={show(default)}" in printed


def test_help_shows_comments(capsys):
    cli.main(["calibrate", "--help"])
    printed = capsys.readouterr().out
    assert "  sampling.steps=100                    that the sampler visits\n" in printed
    assert "images 0 .. num-1 of the seed\n" in printed


def test_unknown_words_get_one_sentence(capsys):
    for words, said in (
        (["calibrat"], "error: command 'calibrat' is unknown; did you mean 'calibrate'?\n"),
        (
            ["calibrate", "cifar10-compat", "out=x"],
            "error: no model, bits, method or preset is called 'cifar10-compat'; "
            "did you mean 'cifar10-compact'?\n",
        ),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(words)
        assert end.value.code == 2 and capsys.readouterr().err == said


def test_names_stand_for_files_from_any_folder(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["quantize", "cifar10-compact", "w4a8", "minmax", "dry_run=true"])
    by_name = capsys.readouterr().out
    files = [
        str(PROJECT / "configs" / name)
        for name in ("model/cifar10-compact.yaml", "bits/w4a8.yaml", "method/minmax.yaml")
    ]
    cli.main(["quantize", *files, "dry_run=true"])
    by_file = capsys.readouterr().out
    parts = [text.partition("\ntime: about ") for text in (by_name, by_file)]  # this is measured
    assert parts[0][0] == parts[1][0] and all(measured for _, _, measured in parts)
    assert "cifar10-compact: " in by_name


def test_find_yaml(tmp_path, monkeypatch):
    model = str(PROJECT / "configs/model/cifar10.yaml")
    monkeypatch.chdir(tmp_path)
    assert find_yaml("cifar10", ["bits", "model"]) == model
    assert find_yaml("configs/model/cifar10.yaml", ["model"]) == model
    assert find_yaml(Path("other/x.yaml"), ["model"]) == "other/x.yaml"  # its reader complains
    Path("cifar10").write_text("name: mine")
    assert find_yaml("cifar10", ["model"]) == "cifar10"  # a file that is here comes first
    with pytest.raises(ValueError, match="no preset is called 'dem'; did you mean 'demo'"):
        find_yaml("dem", ["preset"])
    assert known_names("preset") == ["demo", "fast", "paper"]


def test_flags_and_their_values_are_no_names(monkeypatch):
    seen = []
    monkeypatch.setattr("tinydm.compare.run", seen.extend)
    cli.main(["compare", "smoke", "--jobs", "2", "out=x"])
    assert seen == [str(PROJECT / "configs/compare/smoke.yaml"), "--jobs", "2", "out=x"]


def test_names_of_configurations_are_unique_among_what_a_recipe_is_made_of():
    names = known_names(*cli.RECIPE)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("word", sorted({word.split()[0] for word in cli.COMMANDS} - {"doctor"}))
def test_every_command_is_a_script_too(word):
    lines = (PROJECT / "scripts" / f"{word}.py").read_text().splitlines()
    assert len(lines) <= 13
    assert any(f'main(["{word}"' in line for line in lines) or word == "download"


def test_a_script_runs_from_any_folder(tmp_path):
    script = [sys.executable, PROJECT / "scripts/sample.py", "nowhere"]
    ended = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("error: nowhere is no run folder")


def test_download_needs_the_standard_library_alone(tmp_path):
    """-I -S: neither the environment nor installed packages are seen."""
    script = [sys.executable, "-I", "-S", PROJECT / "scripts/download.py", "--list"]
    ended = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout.startswith("cifar10  DDPM CIFAR-10"), ended.stderr

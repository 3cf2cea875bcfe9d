"""A script ends in one sentence and the right status, whatever goes wrong on the user's side."""

import errno
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from base.errors import check_options, main, print_log

ROOT = Path(__file__).resolve().parents[2]


def run_main(monkeypatch, body, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
    main(body)


def raising(error):
    def body(_):
        raise error

    return body


ENDINGS = [
    (ValueError("bits is 0; expected 2 to 32"), 2, "error: bits is 0; expected 2 to 32\n"),
    (KeyboardInterrupt(), 130, "stopped; run the same command to continue\n"),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "error: no space is left on the disk; "),
    (
        RuntimeError("I/O error: No space left on device (os error 28)"),
        2,
        "error: no space is left on the disk; ",
    ),
    (
        PermissionError(errno.EACCES, "Permission denied", "/root/x"),
        2,
        "error: /root/x: Permission denied; ",
    ),
]


@pytest.mark.parametrize("error, status, sentence", ENDINGS)
def test_endings(monkeypatch, capsys, error, status, sentence):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, raising(error), "x=1")
    printed = capsys.readouterr()
    assert end.value.code == status and printed.out == ""
    assert printed.err.startswith(sentence) and printed.err.count("\n") == 1


def test_our_own_mistakes_keep_their_traceback(monkeypatch):
    with pytest.raises(KeyError):
        run_main(monkeypatch, raising(KeyError("x")), "x=1")


def test_arguments_are_passed_on_and_success_is_silent(monkeypatch):
    seen = []
    run_main(monkeypatch, seen.append, "a.yaml", "b=2")
    assert seen == [["a.yaml", "b=2"]]


@pytest.mark.parametrize("arguments", [(), ("-h",), ("--help",)])
def test_help_is_the_docstring(arguments):
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts/download.py", *arguments], capture_output=True, text=True
    )
    assert ended.returncode == 0 and ended.stdout.startswith("Fetch public checkpoints")


def test_status_and_sentence_of_a_real_script():
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts/download.py", "cifar"], capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.startswith("error: checkpoint 'cifar' is unknown; choose from cifar10, ")


def test_what_the_library_logs_is_printed_once_and_plain(monkeypatch, capsys):
    print_log()
    log = logging.getLogger("tinydm")
    run_main(monkeypatch, lambda _: (log.info("raw weights"), log.debug("unseen")), "x=1")
    assert capsys.readouterr().out == "raw weights\n"


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"widht": 1}, "the toy has no key 'widht'; did you mean 'width'?"),
        ({"colour": 1}, "the toy has no key 'colour'; known: width, depth"),
        ({"depth": 1}, "the toy needs width in the YAML"),
    ],
)
def test_options_that_are_unknown_or_missing(options, sentence):
    known = {"width": 0, "depth": 0}
    with pytest.raises(ValueError) as error:
        check_options("the toy", options, known, ["width"], kind="key", where=" in the YAML")
    assert str(error.value) == sentence
    check_options("the toy", known, known, known)


def test_what_takes_no_options_says_so():
    with pytest.raises(ValueError, match="^builder 'x' has no option 'a'; known: none$"):
        check_options("builder 'x'", ["a"], ())


def test_an_error_without_a_path_is_not_blamed_on_one(monkeypatch):
    with pytest.raises(PermissionError):
        run_main(monkeypatch, raising(PermissionError("no such right")), "x=1")

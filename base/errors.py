"""A user's mistake ends in one sentence and status 2, no traceback. Standard library alone."""

import difflib
import errno
import logging
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


def unknown_word(complaint: str, word: str, known: Iterable[str]) -> str:
    """Ends a complaint about a word: '<complaint>; did you mean x?', or with what is known."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    if near:
        return f"{complaint}; did you mean '{near[0]}'?"
    return f"{complaint}; known: {', '.join(map(str, known))}"


def check_options(
    what: str,
    options: Iterable[str],
    known: Iterable[str],
    needed: Iterable[str] = (),
    *,
    kind: str = "option",
    where: str = "",
) -> None:
    """Raises ValueError for the first of `options` that is not `known` ("<what> has no <kind> 'x'",
    with a guess) and for `needed` ones that are missing ("<what> needs x, y" and `where`)."""
    known = list(known)
    for name in options:
        if name not in known:
            complaint = f"{what} has no {kind} '{name}'"
            raise ValueError(unknown_word(complaint, str(name), known or ["none"]))
    missing = [name for name in needed if name not in options]
    if missing:
        raise ValueError(f"{what} needs {', '.join(missing)}{where}")


def main(run: Callable[[list[str]], object]) -> None:
    """run(arguments) of the command line; without any, or with --help, its module's docstring."""
    arguments = sys.argv[1:]
    if not arguments or asks_for_help(arguments):
        print(sys.modules[run.__module__].__doc__.strip())
    else:
        guard(run, arguments)


def asks_for_help(arguments: list[str]) -> bool:
    return arguments[:1] in (["-h"], ["--help"])


def guard(run: Callable[[list[str]], object], arguments: list[str]) -> None:
    """run(arguments), with the log printed; a user's mistake ends in one sentence and status 2."""
    print_log()
    try:
        run(arguments)
    except ValueError as error:
        stop(2, f"error: {error}")
    except KeyboardInterrupt:
        stop(130, "stopped; run the same command to continue")
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is None:  # not about a path
            raise
        stop(2, f"error: {error.filename}: {error.strerror}; give another path")
    except Exception as error:
        # torch's; scripts that need no torch do not import it
        if type(error).__name__ == "OutOfMemoryError":
            remedy = "lower sampling.batch_size, max_batch or effort.batch_size"
            stop(2, f"error: {str(error).partition('. ')[0]}; {remedy}, or choose device=cpu")
        if not disk_is_full(error):
            raise
        remedy = "free some and run the same command to continue"
        stop(2, f"error: no space is left on the disk; {remedy}")


class _Printer(logging.Handler):
    """Prints the bare message to what is the standard output at that time."""

    def emit(self, record):
        print(self.format(record), flush=True)


def print_log() -> None:
    """Prints from now on, once each, what the library says by logging.getLogger("tinydm")."""
    logger = logging.getLogger("tinydm")
    logger.setLevel(logging.INFO)
    if not any(isinstance(handler, _Printer) for handler in logger.handlers):
        logger.addHandler(_Printer())


def stop(status: int, sentence: str) -> NoReturn:
    """Ends the process with a sentence on the standard error."""
    print(sentence, file=sys.stderr)
    sys.exit(status)


def disk_is_full(error: Exception) -> bool:
    """Tells whether `error` comes from a full disk; libraries wrap the system's, and its words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)

"""A user's mistake ends in one sentence and exit status 2, never in a traceback. Needs the standard
library alone."""

import difflib
import errno
import sys


def unknown_word(complaint, word, known):
    """'<complaint>; did you mean x?' or the list of what is known."""
    near = difflib.get_close_matches(word, known, 1, 0.5)
    return complaint + (
        f"; did you mean '{near[0]}'?" if near else f"; known: {', '.join(map(str, known))}"
    )


def main(run):
    """run(arguments); without arguments or with --help the docstring of its module is printed."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(sys.modules[run.__module__].__doc__.strip())
        return
    try:
        run(arguments)
    except ValueError as error:
        stop(2, f"error: {error}")
    except KeyboardInterrupt:
        stop(130, "stopped; run the same command to continue")
    except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
        stop(2, f"error: {error.filename}: {error.strerror}; give another path")
    except Exception as error:
        # torch's; scripts that need no torch do not import it
        if type(error).__name__ == "OutOfMemoryError":
            stop(
                2,
                f"error: {str(error).partition('. ')[0]}; lower sampling.batch_size, max_batch or "
                "effort.batch_size, or choose device=cpu",
            )
        if not disk_is_full(error):
            raise
        stop(
            2, "error: no space is left on the disk; free some and run the same command to continue"
        )


def stop(status, sentence):
    print(sentence, file=sys.stderr)
    sys.exit(status)


def disk_is_full(error):
    """Whether `error` comes from a full disk; libraries wrap the system's error in their own and
    keep its words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)

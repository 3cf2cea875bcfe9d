"""What all scripts share: a user's mistake ends in one sentence and exit status 2, never in a traceback."""
import errno
import sys


def main(run):
    """run(arguments); without arguments or with --help the script's docstring is printed."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(sys.modules["__main__"].__doc__.strip())
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
        if type(error).__name__ == "OutOfMemoryError":           # torch's; scripts that need no torch do not import it
            stop(2, f"error: {str(error).partition('. ')[0]}; lower sampling.batch_size, max_batch or "
                    "effort.batch_size, or choose device=cpu")
        if not disk_is_full(error):
            raise
        stop(2, "error: no space is left on the disk; free some and run the same command to continue")


def stop(status, sentence):
    print(sentence, file=sys.stderr)
    sys.exit(status)


def disk_is_full(error):
    """Whether `error` comes from a full disk; libraries wrap the system's error in their own and keep its words."""
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


def split_arguments(arguments):
    """Command line -> (what is no key=value, the key=value words)."""
    return [a for a in arguments if "=" not in a], [a for a in arguments if "=" in a]


def one_folder(arguments):
    """Command line of a later stage -> (run folder, overrides)."""
    plain, overrides = split_arguments(arguments)
    if len(plain) != 1:
        raise ValueError(f"expected one run folder and key=value words, found {' '.join(plain) or 'no folder'}")
    return plain[0], overrides

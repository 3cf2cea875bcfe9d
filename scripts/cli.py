"""What all scripts share: a user's mistake ends in one sentence and exit status 2, never in a traceback."""
import sys


def main(run):
    """Call run(arguments); print the docstring for --help."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(sys.modules["__main__"].__doc__.strip())
        return
    try:
        run(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}" if sys.stderr.isatty() else _plain(error))


def _plain(error):
    print(f"error: {error}", file=sys.stderr)
    return 2

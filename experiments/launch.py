"""How launchers start and end: flags and nothing else, one line for what is wrong."""

import contextlib
import sys

from absl import app

from experiments import signals


def run(main, *, takes_arguments=False):
    """Run `main()` under absl, which parses the flags.

    A UsageError of `main` ends the program in one line, status 2, and so does an
    argument that is no option: `budget=3` must not be a run with the default. Ctrl-C
    ends it with status 130, SIGTERM with 143, both in one line (see `signals`).

    Args:
        main: the launcher; called with the list of arguments if it takes any.
        takes_arguments: words that are no option are meant for `main`.
    """

    def checked(argv):
        signals.begin()
        try:
            if argv[1:] and not takes_arguments:
                raise app.UsageError(
                    f"unexpected argument {argv[1]!r}; options start with --"
                )
            main(argv[1:]) if takes_arguments else main()
        except app.UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            signals.uninstall()

    signals.install()
    app.run(checked)


@contextlib.contextmanager
def checking():
    """A block before the work: what is wrong in it ends the program in one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise app.UsageError(" ".join(str(error).split())) from None

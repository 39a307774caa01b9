"""How commands start and end: flags and nothing else, one line for what is wrong."""

import contextlib
import sys

from absl import app

from experiments import options, signals


def run(main, *kinds, takes_arguments=False):
    """Run `main` under absl with the records that the flags say.

    A ValueError of the flags and a UsageError of `main` end the program in one line,
    status 2, and so does an argument that is no option: `budget=3` must not be a run
    with the default. Ctrl-C ends it with status 130, SIGTERM with 143, both in one
    line (see `signals`).

    Args:
        main: called with a record of each kind, then with the list of arguments if it
            takes any.
        kinds: subclasses of `options.Options`, whose flags are defined here.
        takes_arguments: words that are no option are meant for `main`.
    """

    def checked(argv):
        signals.begin()
        try:
            if argv[1:] and not takes_arguments:
                raise app.UsageError(
                    f"unexpected argument {argv[1]!r}; options start with --"
                )
            with checking():
                records = [options.parse(kind) for kind in kinds]
            main(*records, *([argv[1:]] if takes_arguments else []))
        except app.UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        finally:
            signals.uninstall()

    signals.install()
    options.define(*kinds)
    app.run(checked)


@contextlib.contextmanager
def checking():
    """A block before the work: what is wrong in it ends the program in one line."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise app.UsageError(" ".join(str(error).split())) from None

"""How launchers start: a command line of options and nothing else."""

import sys

from absl import app


def run(main):
    """Run `main()` under absl, which parses the flags.

    A UsageError of `main` ends the program in one line, status 2, and so does an
    argument that is no option: `budget=3` must not be a run with the default.
    """

    def checked(argv):
        try:
            if argv[1:]:
                raise app.UsageError(
                    f"unexpected argument {argv[1]!r}; options start with --"
                )
            main()
        except app.UsageError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    app.run(checked)

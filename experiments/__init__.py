"""Experiments: each writes one run directory; nothing imports this package."""

import sys

# `python -m experiments.NAME` imports this file first: from here on, before the seconds
# that it takes to import jax, Ctrl-C ends a launcher in one line.
if sys.argv[0] == "-m" and any(
    word.startswith(f"{__name__}.") for word in sys.orig_argv[1:]
):
    from experiments import signals

    signals.install()

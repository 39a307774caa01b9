"""Blocks that Ctrl-C does not cut in two. Host only, no jax."""

from __future__ import annotations

import signal
import threading

_DEFERRED = (signal.SIGINT, signal.SIGTERM)


class Whole:
    """A block that runs to its end before a signal raises in it; may be nested.

    Between its beginning and its end, what the engine knows and what the device holds
    differ, and an exception in between would part them for ever. Handlers written in
    Python (Ctrl-C's raises KeyboardInterrupt) therefore run when the block has ended.
    Signals come to the main thread only: in another one there is nothing to defer.

    Attributes:
      broken: what ended a block before its end nevertheless, one line, or None. Errors
        do, and exceptions raised by other means than these two signals.
    """

    def __init__(self):
        self.broken = None
        self._depth = 0
        self._deferrals = ()

    def __enter__(self):
        if not self._depth and threading.current_thread() is threading.main_thread():
            self._deferrals = tuple(_Deferral(number) for number in _DEFERRED)
        self._depth += 1
        return self

    def __exit__(self, kind, error, traceback):
        self._depth -= 1
        if error is not None and self.broken is None:
            self.broken = _one_line(error)
        if not self._depth:
            deferrals, self._deferrals = self._deferrals, ()
            _end(deferrals)


def _end(deferrals):
    """End all of them, whatever the handler of one raises."""
    if deferrals:
        try:
            deferrals[0].end()
        finally:
            _end(deferrals[1:])


def _one_line(error):
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Deferral:
    """From construction to `end`, one signal is noted instead of handled."""

    def __init__(self, number):
        self._number, self._received = number, None
        handler = signal.getsignal(number)
        # The default and "ignore" raise nothing; None was not installed from Python.
        self._handler = handler if callable(handler) else None
        if self._handler:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self._received = (number, frame)

    def end(self):
        if self._handler:
            signal.signal(self._number, self._handler)
        if self._received:
            self._handler(*self._received)

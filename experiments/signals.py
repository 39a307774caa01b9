"""How a launcher ends on Ctrl-C or SIGTERM: one line, status 130 or 143, nothing lost.

The handler ends the process itself and raises nothing. An exception could come amid a
commit, be swallowed by a library, or show up as a traceback of a finaliser. What must
not be cut short says so with `deferred`.

While XLA compiles, which may take a minute, no handler can run. A second signal then
ends the process at once, from a thread: files are left as a kill would leave them,
which `experiments.record` is made for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time

_STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
_SAME_S = 0.5  # a second signal within this time is taken for the first one

_begun = False  # the launcher's own work
_depth = 0  # of `deferred` blocks
_pending = None  # signal that came in one
_at_end = []  # what to call on the way out, innermost last
_resume = None  # how to go on with this run, if that is possible
_kept = {}  # files written so far, in order
_leaving = threading.Lock()  # taken once, on the way out


def install() -> None:
    """Take over SIGINT and SIGTERM, unless the process was told to ignore them."""
    if any(signal.getsignal(number) is _on_signal for number in _STATUS):
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reader,), daemon=True).start()
    for number in _STATUS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _on_signal)


def begin() -> None:
    """The start, with all its imports, is over."""
    global _begun
    _begun = True


def uninstall() -> None:
    """Leave both signals to the system: the work is done, and they end the process."""
    for number in _STATUS:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def deferred():
    """A block that a first signal does not cut short; may be nested."""
    global _depth
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
        if _pending is not None and not _depth:
            _leave(_pending)


@contextlib.contextmanager
def at_end(call):
    """A block in which `call()` is run when a signal ends the process."""
    _at_end.append(call)
    try:
        yield
    finally:
        _at_end.remove(call)


@contextlib.contextmanager
def temporary_directory():
    """A directory for the block, which goes when a signal ends the process, too."""
    with tempfile.TemporaryDirectory() as directory:
        with at_end(lambda: shutil.rmtree(directory, ignore_errors=True)):
            yield directory


def resumable(how: str) -> None:
    """From now on an interrupted run can go on; `how` completes "interrupted: "."""
    global _resume
    _resume = how


def kept(path) -> None:
    """The file of that name holds what was done so far, whatever comes.

    To be called in the `deferred` block that writes it.
    """
    _kept[str(path)] = None


def _on_signal(number, frame):
    del frame
    global _pending
    if _depth:
        _pending = number
    else:
        _leave(number)


def _watch(reader):
    """End the process on a second signal, if its main thread has not yet done so."""
    first = None
    while numbers := os.read(reader, 1):
        if numbers[0] not in _STATUS:
            continue
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > _SAME_S:
            _leave(numbers[0], run_calls=False)


def _leave(number, *, run_calls=True):
    """End the process; returns only if it is being ended already."""
    if not _leaving.acquire(blocking=False):
        return
    before = failed = ""
    if run_calls:
        for call in reversed(_at_end):
            try:
                call()
            except Exception as error:
                failed = f" ({type(error).__name__} on the way out: {error})"
        with contextlib.suppress(Exception):  # closed, or amid a write of its own
            sys.stdout.flush()
    elif _at_end:  # among them is what ends the line of a progress bar
        before = "\n"
    with contextlib.suppress(OSError):
        line = f"{before}{_last_line()}{failed}\n"
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(_STATUS[number])


def _last_line():
    if not _begun:
        return "interrupted while starting; nothing was done"
    if _resume:
        return f"interrupted: {_resume}"
    if _kept:
        return f"interrupted; what was done so far is in {', '.join(_kept)}"
    return "interrupted; nothing was kept"

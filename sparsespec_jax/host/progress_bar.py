"""What a progress bar says before there is progress. No jax."""

import contextlib
import threading
import time

_PAUSES = {True: 1.0, False: 30.0}  # seconds; what is written to a file stays there


@contextlib.contextmanager
def compiling(bar):
    """Say on a tqdm bar for how many seconds the block has been compiling.

    A thread does: the block is in the compiler. The bar's own text, time and rate begin
    when the block ends. None for no bar.
    """
    if bar is None:
        yield
        return
    text, start = getattr(bar, "desc", None), time.monotonic()
    has_ended, pause = threading.Event(), _PAUSES[_is_shown(bar)]

    def tell():
        while not has_ended.is_set():
            seconds = time.monotonic() - start
            bar.set_description_str(f"compiling {seconds:.0f} s")
            has_ended.wait(pause)

    thread = threading.Thread(target=tell, name="compiling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        has_ended.set()
        thread.join()
        bar.set_description_str(text)
        bar.unpause()


def _is_shown(bar):
    """Whether a text replaces the one before: on a terminal, and in a notebook."""
    return hasattr(bar, "container") or getattr(bar.fp, "isatty", bool)()

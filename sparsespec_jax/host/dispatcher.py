"""Calls in order, at once or in a thread of their own. Host only, no jax."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor


class Dispatcher:
    """Runs calls one behind the other.

    threaded: in a thread, and the caller goes on meanwhile; else `submit` returns when
    the call has ended.
    """

    def __init__(self, *, threaded):
        self._name = f"dispatch-{id(self):x}"
        self._pool = ThreadPoolExecutor(1, self._name) if threaded else None
        self.seconds = 0.0  # of processor time that the thread has needed

    def submit(self, function, *args) -> Future:
        """The result of `function(*args)` to come; what it raises, its result raises.

        Without a thread, what it raises comes at once.
        """
        if self._pool is not None:
            return self._pool.submit(self._timed, [(function, args)])
        future = Future()
        future.set_result(function(*args))
        return future

    def settle(self):
        """Wait until all calls so far have ended."""
        if self._pool is not None:
            self._pool.submit(int).result()

    def close(self):
        """End the thread, when the call under way has ended; the others are dropped."""
        if self._pool is not None:
            own = threading.current_thread().name.startswith(self._name)
            self._pool.shutdown(wait=not own, cancel_futures=True)

    def _timed(self, call):
        function, args = call.pop()  # the thread holds neither once the result is there
        start = time.thread_time()
        try:
            return function(*args)
        finally:
            self.seconds += time.thread_time() - start


class HostClock:
    """What steps cost the host: processor time of the busiest of two threads.

    These are the thread that calls and that of a Dispatcher.
    """

    def __init__(self, dispatcher):
        self._dispatcher = dispatcher
        self._last = self._now(0)

    def per_step(self, num_steps) -> float:
        """Seconds per step since the last call, 0 if none ran; `num_steps`: so far."""
        before, self._last = self._last, self._now(num_steps)
        pairs = zip(self._last, before, strict=True)
        steps, *seconds = (now - then for now, then in pairs)
        # The clock of another calling thread may be behind.
        return max(0.0, *seconds) / steps if steps else 0.0

    def _now(self, num_steps):
        return num_steps, time.thread_time(), self._dispatcher.seconds

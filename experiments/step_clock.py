"""When every step begins and ends on the device, by its own clock.

A profiler that records every kernel stalls the host, so a step that the host is late
for may be its doing. Here the compiled step reads the GPU's clock before its first
kernel and behind its last one: two launches more, and nothing else is different.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device_clock import nanoseconds, read_clock
from sparsespec_jax import Engine
from sparsespec_jax.device.step import jit_step


class ClockedEngine(Engine):
    """An Engine whose steps say when they began and ended; GPU only."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        # int32 [2, 2] of every step, on the device. The steps must not hold the engine.
        self._times = times = []
        plain, impl = self.device_steps.step_function, self.impl
        exact = self.config.numerics == "exact"

        def step_function(filters, shape):
            step = _clocked(plain(filters, shape), impl, exact)

            def run(*args, prefill):
                state, outcome, when = step(*args, prefill=prefill)
                times.append(when)
                return state, outcome

            return run

        self.device_steps.step_function = step_function

    def take_times(self) -> np.ndarray:
        """Begin and end int64 [steps, 2] of the steps since the last call, in ns."""
        self.device_steps.settle()
        times = np.asarray(jax.device_get(self._times), np.int32).reshape(-1, 2, 2)
        self._times.clear()
        return nanoseconds(times)


def with_clock(function):
    """The step `function`, with the times of begin and end behind its results."""

    def step(params, state, buffer, *, prefill):  # so traces call it, see time_split
        begin, buffer = read_clock(before=buffer)
        state, outcome = function(params, state, buffer, prefill=prefill)
        # Selection and gather of the last layers may be what ends last.
        end = read_clock(outcome, state.layers[-1].kv_pages)
        return state, outcome, jnp.stack([begin, end])

    return step


@functools.cache
def _clocked(step, impl, exact):
    """The jitted form of `with_clock` of what the jitted `step` was made of."""
    return jit_step(with_clock(step.__wrapped__), impl, exact=exact)


def idle_between(times: np.ndarray) -> dict:
    """When nothing of a step ran, from begin and end int64 [steps, 2] in ns.

    Raises:
      ValueError: fewer than two steps.
    """
    if len(times) < 2:
        raise ValueError(f"{len(times)} steps have nothing between them")
    gaps = np.maximum(times[1:, 0] - times[:-1, 1], 0)
    window = times[-1, 1] - times[0, 0]
    return {
        "num_steps": len(times),
        "window_s": 1e-9 * float(window),
        "step_ms": 1e-6 * float(np.median(times[:, 1] - times[:, 0])),
        "idle_between_steps_share": float(gaps.sum() / window),
        "idle_between_steps_us": {
            f"p{q}": 1e-3 * float(np.percentile(gaps, q)) for q in (50, 99, 100)
        },
    }

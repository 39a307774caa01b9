"""Times programs on this device, and what the memory of it can do."""

import functools
import gc
import os
import tempfile
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import device_trace

REPEATS = 5
SECONDS = 0.15  # of one repeat; the dispatch of its first program is part of the time
MIN_PROGRAMS = 8


def check_serial() -> None:
    """Raises ValueError if XLA_FLAGS let calls of a program run side by side."""
    if "CONCURRENT" in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(
            "XLA_FLAGS has command_buffer_scheduling_mode=CONCURRENT: calls would run "
            "side by side, and none be timed alone; leave it out"
        )


def drop_programs() -> None:
    """Frees compiled programs that nobody holds.

    With five or more of them alive, a call of 40 us takes 0.8 us longer on an H100,
    in old programs and in new ones (docs/kernels.md).
    """
    jax.clear_caches()
    gc.collect()


def time_us(fn, layers: list[tuple], shared: tuple = ()) -> float:
    """Returns the median time of one call of `fn` in a program that makes many."""
    return _time_us(*_program_of(fn, layers, shared)) / len(layers)


def device_us(fn, layers: list[tuple], shared: tuple = ()) -> float:
    """Returns what the kernels of one call of `fn` take, by the profiler of a GPU.

    For calls that take less than the host needs to launch them.
    """
    program, x = _program_of(fn, layers, shared)
    x = jax.block_until_ready(program(x))
    with tempfile.TemporaryDirectory() as directory:
        with device_trace.trace(directory):
            for _ in range(MIN_PROGRAMS):
                x = program(x)
            jax.block_until_ready(x)
        kernels = device_trace.load_kernels(directory)
    total = sum(kernel.duration for kernel in kernels)
    return total * 1e-3 / MIN_PROGRAMS / len(layers)


def _program_of(fn, layers, shared):
    """Returns a program of one call per layer that takes its last results, and such."""
    one = jax.jit(fn)

    @functools.partial(jax.jit, donate_argnums=2, keep_unused=True)
    def program(layers, shared, old):
        return [one(*args, *shared) for args in layers]

    old = jax.eval_shape(program, layers, shared, None)
    old = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), old)
    # Results at the same addresses: a captured graph needs no update.
    return functools.partial(program, layers, shared), old


class Rates(NamedTuple):
    """What the memory of a device can do, bytes per second."""

    read: float
    copy: float  # bytes read and bytes written


def measure_rates() -> Rates:
    """Returns the rates of a large read and of a large copy."""
    rows = 2**14 if _is_cpu() else 2**19
    x = jnp.ones((rows, 4096), jnp.bfloat16)
    read = time_us(lambda x: x.astype(jnp.float32).sum(1), [(x,)])
    copied = time_us(copy, [(x,)])
    return Rates(x.nbytes / read * 1e6, 2 * x.nbytes / copied * 1e6)


def copy(x: jax.Array) -> jax.Array:
    """Returns a copy that the device makes, not a kernel.

    An elementwise kernel of XLA (x + 1), whose threads have 8 bytes in flight each, has
    a bound of its own, below what newer memories give.
    """
    return jnp.copy(x)


def measure_flop_rate(dtype) -> float:
    """Returns the rate of a product of large matrices, operations per second."""
    size = 512 if _is_cpu() else 4096
    keys = jax.random.split(jax.random.key(0))
    x, y = (jax.random.normal(key, (size, size), dtype) for key in keys)
    return 2 * size**3 / time_us(jnp.dot, [(x, y)]) * 1e6


def time_donated_us(fn, x) -> float:
    """Returns the median time of a program that takes its own result."""
    return _time_us(jax.jit(fn, donate_argnums=0), x)


def _time_us(program, x) -> float:
    """Returns the median time of a compiled program that takes its own result."""

    def seconds(count, x):
        start = time.perf_counter()
        for _ in range(count):
            x = program(x)
        jax.block_until_ready(x)
        return (time.perf_counter() - start) / count, x

    _, x = seconds(2, x)
    rough, x = seconds(MIN_PROGRAMS, x)
    count, times = max(MIN_PROGRAMS, int(SECONDS / rough)), []
    for _ in range(REPEATS):
        time_of_one, x = seconds(count, x)
        times.append(time_of_one)
    return float(np.median(times)) * 1e6


def _is_cpu():
    return jax.default_backend() == "cpu"


def relative_error(actual, expected) -> float:
    """Returns |actual - expected| / |expected| over all elements."""
    actual = jnp.asarray(actual, jnp.float32)
    expected = jnp.asarray(expected, jnp.float32)
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


def against_reference(kernel, layers: list[tuple], shared: tuple, impl: str) -> dict:
    """Returns time, rate and error of a small kernel, and the time of its reference."""
    run, reference = (functools.partial(kernel, impl=i) for i in (impl, "reference"))
    # On a GPU both take less than the host needs to launch them.
    clock = device_us if impl == "gpu" else time_us
    us = clock(run, layers, shared)
    got, expected = (fn(*layers[0], *shared) for fn in (run, reference))
    moved = sum(x.nbytes for x in (*layers[0], *got))
    return dict(
        us=us,
        bytes=moved,
        tb_per_s=moved / us / 1e6,
        error=max(map(relative_error, got, expected)),
        xla_us=clock(reference, layers, shared),
    )

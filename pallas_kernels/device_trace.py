"""Kernels that ran on a GPU, from a profiler trace."""

import contextlib
import pathlib
from typing import NamedTuple

import jax


class Kernel(NamedTuple):
    """One run of a kernel or copy on the device; nanoseconds."""

    name: str
    start: float
    duration: float


@contextlib.contextmanager
def trace(directory):
    """Records the device while the block runs, without Python frames: they are slow."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1
    jax.profiler.start_trace(str(directory), profiler_options=options)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def load_kernels(directory) -> list[Kernel]:
    """Returns the kernels of the newest trace under `directory`, by start.

    Raises:
      ValueError: no trace, or none of a GPU.
    """
    paths = sorted(
        pathlib.Path(directory).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime
    )
    if not paths:
        raise ValueError(f"no trace under {directory}")
    data = jax.profiler.ProfileData.from_file(str(paths[-1]))
    kernels = [
        Kernel(event.name, event.start_ns, event.duration_ns)
        for plane in data.planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")
        for event in line.events
    ]
    if not kernels:
        raise ValueError(f"{paths[-1]} holds no kernels of a GPU")
    return sorted(kernels, key=lambda k: k.start)

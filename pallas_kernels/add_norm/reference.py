"""The specification of the sum with its norm, in plain jnp."""

import functools

import jax

from pallas_kernels.array_types import Stream, StreamParts, StreamScale
from pallas_kernels.common import as_rounded, rms_norm, sum_of_parts


@functools.partial(jax.jit, static_argnames="eps")
def add_norm_reference(
    x: Stream, y: StreamParts, scale: StreamScale, *, eps: float
) -> tuple[Stream, Stream]:
    """Returns what `api.add_norm` documents; same arguments, no checks."""
    stream = x + sum_of_parts(y, x.dtype)
    return stream, rms_norm(as_rounded(stream), scale, eps).astype(x.dtype)

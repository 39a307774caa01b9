"""The specification of the sum with its norm, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.common import as_rounded


@functools.partial(jax.jit, static_argnames="eps")
def add_norm_reference(
    x: jax.Array, y: jax.Array, scale: jax.Array, *, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns what `api.add_norm` documents; same arguments, no checks."""
    stream = x + y
    wide = as_rounded(stream)
    power = jnp.mean(wide * wide, axis=-1, keepdims=True)
    normed = wide * jax.lax.rsqrt(power + eps) * scale.astype(jnp.float32)
    return stream, normed.astype(x.dtype)

"""The specification of the dense chain, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.add_norm.reference import add_norm_reference
from pallas_kernels.common import as_rounded
from pallas_kernels.dense_chain.api import ChainWeights


@functools.partial(jax.jit, static_argnames="eps")
def dense_chain_reference(
    mixed: jax.Array,
    stream: jax.Array,
    weights: ChainWeights,
    counters: jax.Array,
    *,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns what `api.dense_chain` documents; same arguments, no checks."""
    add = functools.partial(add_norm_reference, eps=eps)
    # A product is the only part of itself; the sum rounds it.
    stream, normed = add(stream, _product(mixed, weights.out)[None], weights.norm)
    inner = _product(normed, weights.gate_up.reshape(stream.shape[1], -1))
    gate, up = jnp.split(as_rounded(inner.astype(mixed.dtype)), 2, axis=1)
    gated = (jax.nn.silu(gate) * up).astype(mixed.dtype)
    y = _product(gated, weights.down)[None]
    stream, normed = add(stream, y, weights.next_norm)
    if weights.qkv is None:
        return stream, normed, counters
    return stream, _product(normed, weights.qkv)[None], counters


def _product(x, kernel):
    """Returns x [T, in], as rounded, times kernel [in, N]: float32 [T, N]."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.dot(
        as_rounded(x).astype(x.dtype),
        kernel,
        precision=precision,
        preferred_element_type=jnp.float32,
    )

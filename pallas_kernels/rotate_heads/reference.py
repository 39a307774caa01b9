"""The specification of the head rotation, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import (
    Angles,
    HeadScale,
    Projection,
    Queries,
    RowsOfHeads,
)
from pallas_kernels.common import as_rounded, rms_norm, sum_of_parts


@functools.partial(jax.jit, static_argnames=("eps", "dtype"))
def rotate_heads_reference(
    qkv: Projection,
    cos: Angles,
    sin: Angles,
    q_scale: HeadScale | None,
    k_scale: HeadScale | None,
    *,
    eps: float,
    dtype: jnp.dtype | None = None,
) -> tuple[Queries, RowsOfHeads]:
    """Returns what `api.rotate_heads` documents; same arguments, no checks."""
    qkv = sum_of_parts(qkv, dtype, ndim=4)
    num_tokens, _, width, head_size = qkv.shape
    k_index = width - 2
    heads = qkv[:, :, : k_index + 1]
    if q_scale is not None:
        # Queries and keys in one pass: each would cost XLA a launch of its own.
        is_key = jnp.arange(k_index + 1)[:, None] == k_index
        scale = jnp.where(is_key, k_scale, q_scale)
        heads = rms_norm(heads.astype(jnp.float32), scale, eps).astype(qkv.dtype)
    first, second = jnp.split(as_rounded(heads), 2, axis=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    turned = (first * cos - second * sin, second * cos + first * sin)
    heads = jnp.concatenate(turned, axis=-1).astype(qkv.dtype)
    q = heads[:, :, :k_index].reshape(num_tokens, -1, head_size)
    return q, jnp.concatenate([heads[:, :, k_index], qkv[:, :, -1]], axis=-1)

"""The specification of token selection, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import PerLane, Scores
from pallas_kernels.select_tokens.api import SelectedTokens


@functools.partial(jax.jit, static_argnames=("cap", "num_recent", "per_layer"))
def select_tokens_reference(
    scores: Scores,
    lengths: PerLane,
    budgets: PerLane,
    *,
    cap: int,
    num_recent: int,
    per_layer: bool,
) -> SelectedTokens:
    """Returns what `api.select_tokens` documents; same arguments, no checks."""
    lanes, num_heads, num_candidates = scores.shape
    if per_layer:
        scores = functools.reduce(jnp.add, jnp.unstack(scores, axis=1))[:, None]
    counts = jnp.minimum(jnp.minimum(budgets, lengths), cap)[:, None, None]
    lengths = lengths[:, None, None]
    position = jnp.arange(num_candidates)
    is_recent = position >= lengths - jnp.minimum(num_recent, counts)
    keys = jnp.where(is_recent, jnp.iinfo(jnp.int32).max, ordered_keys(scores))
    keys = jnp.where(position < lengths, keys, jnp.iinfo(jnp.int32).min)
    # top_k puts the lower position first among equal keys.
    chosen = jax.lax.top_k(keys, min(cap, num_candidates))[1]
    rank = jnp.arange(chosen.shape[-1])
    chosen = jnp.sort(jnp.where(rank < counts, chosen, num_candidates), axis=-1)
    chosen = jnp.where(rank < counts, chosen, 0)
    chosen = jnp.pad(chosen, ((0, 0), (0, 0), (0, cap - chosen.shape[-1])))
    return SelectedTokens(
        jnp.broadcast_to(chosen, (lanes, num_heads, cap)).astype(jnp.int32),
        jnp.broadcast_to(counts[:, :, 0], (lanes, num_heads)).astype(jnp.int32),
    )


def ordered_keys(scores: jax.Array) -> jax.Array:
    """Returns int32 keys in the order of the float32 `scores`; equal for 0 and -0.

    The bits of non-negative floats grow with their value; those of negative ones
    fall, so all bits but the sign are flipped.
    """
    bits = jax.lax.bitcast_convert_type(
        jnp.where(scores == 0.0, 0.0, scores), jnp.int32
    )
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)

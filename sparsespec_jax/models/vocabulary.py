"""Operations along a vocabulary that is cut over devices, and that no device has whole.

A device holds the scores of V / n tokens, the next ones behind those of the device
before. What crosses is a number or a few for each row and device. Without an axis all
of it is what `jax.numpy` does on one device.
"""

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import Array
from sparsespec_jax.models.collectives import (
    first_of_shard,
    gathered,
    num_shards,
    summed_in_order,
)


def vocabulary_size(local: int, axis: str | None) -> int:
    """Tokens on all devices, from those of one."""
    return local * num_shards(axis)


def token_ids(local: int, axis: str | None) -> Array:
    """Ids int32 [V / n] of this device's tokens."""
    ids = jnp.arange(local)
    return ids if axis is None else ids + first_of_shard(local, axis)


def place_of(tokens: Array, local: int, axis: str | None) -> Array:
    """Where tokens stand among this device's; `local`, outside, if they do not.

    What is already outside the whole vocabulary stays outside.
    """
    if axis is None:
        return tokens
    place = tokens - first_of_shard(local, axis)
    return jnp.where((place >= 0) & (place < local), place, local)


def scores_of(values: Array, tokens: Array, axis: str | None) -> Array:
    """Values [..., V / n] of tokens [..., m], on every device."""
    if axis is None:
        return jnp.take_along_axis(values, tokens, -1)
    local = values.shape[-1]
    place = place_of(tokens, local, axis)
    own = jnp.take_along_axis(values, jnp.minimum(place, local - 1), -1)
    return summed_in_order(jnp.where(place < local, own, 0), axis)


def likeliest(scores: Array, axis: str | None) -> Array:
    """Ids [...] of the largest scores [..., V / n]; of equal ones the lowest.

    One pair for each row and device crosses: a score and the id that has it.
    """
    if axis is None:
        return jnp.argmax(scores, axis=-1)
    ids = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    best = jnp.take_along_axis(scores, ids[..., None], -1)[..., 0]
    ids += first_of_shard(scores.shape[-1], axis)
    best, ids = _gathered_pairs(best, ids, axis)
    first = jnp.argmax(best, axis=0)[None]
    return jnp.take_along_axis(ids, first, 0)[0]


def top_tokens(values: Array, count: int, axis: str | None) -> tuple[Array, Array]:
    """The `count` largest values of rows [R, V / n], and their ids, as `top_k`."""
    if axis is None:
        return jax.lax.top_k(values, count)
    best, ids = jax.lax.top_k(values, min(count, values.shape[-1]))
    ids = ids.astype(jnp.int32) + first_of_shard(values.shape[-1], axis)
    # Those of one device behind those of the one before: equal values keep the order
    # of their ids.
    best, ids = (
        jnp.moveaxis(x, 0, 1).reshape(len(values), -1)
        for x in _gathered_pairs(best, ids, axis)
    )
    best, place = jax.lax.top_k(best, count)
    return best, jnp.take_along_axis(ids, place, -1)


def _gathered_pairs(values, ids, axis):
    """Values float32 and ids int32 of every device, in one collective."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    bits, ids = jnp.moveaxis(gathered(jnp.stack([bits, ids]), axis), 1, 0)
    return jax.lax.bitcast_convert_type(bits, jnp.float32), ids

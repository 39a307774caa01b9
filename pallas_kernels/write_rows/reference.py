"""The specification of the store of new KV rows, in plain jnp."""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="copies_from")
def write_rows_reference(
    kv_pages: jax.Array,
    rows: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    copies_from: int = 0,
) -> jax.Array:
    """Returns what `api.write_rows` documents; same arguments, no checks."""
    copies = rows[copies_from : copies_from + pages.shape[0] - rows.shape[0]]
    is_page = (pages >= 0) & (pages < kv_pages.shape[0])
    pages = jnp.where(is_page, pages, kv_pages.shape[0])
    head = jnp.arange(kv_pages.shape[1])[None]
    rows = jnp.concatenate([rows, copies])
    return kv_pages.at[pages, head, offsets].set(rows, mode="drop")

"""The specification of the store of new KV rows, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import KvPages, NewRows, Places


@functools.partial(jax.jit, static_argnames="copies_from")
def write_rows_reference(
    kv_pages: KvPages,
    rows: NewRows,
    pages: Places,
    offsets: Places,
    *,
    copies_from: int = 0,
) -> KvPages:
    """Returns what `api.write_rows` documents; same arguments, no checks."""
    copies = rows[copies_from : copies_from + pages.shape[0] - rows.shape[0]]
    is_page = (pages >= 0) & (pages < kv_pages.shape[0])
    pages = jnp.where(is_page, pages, kv_pages.shape[0])
    head = jnp.arange(kv_pages.shape[1])[None]
    rows = jnp.concatenate([rows, copies])
    return kv_pages.at[pages, head, offsets].set(rows, mode="drop")

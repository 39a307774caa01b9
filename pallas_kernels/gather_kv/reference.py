"""The specification of the KV row gather, in plain jnp."""

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import Counts, Indices, KvPages, PageTable, TargetTable


@jax.jit
def gather_kv_reference(
    kv_pages: KvPages,
    source_table: PageTable,
    target_table: TargetTable,
    indices: Indices,
    counts: Counts,
) -> KvPages:
    """Returns what `api.gather_kv` documents; same arguments, no checks."""
    num_pages, num_heads, page_size, row_size = kv_pages.shape
    num_rows = num_pages * num_heads * page_size
    row = jnp.arange(indices.shape[-1])
    source = _flat_rows(source_table, indices, kv_pages.shape)
    target = _flat_rows(target_table, row[None, None], kv_pages.shape)
    copied = (row < counts[..., None]) & (source < num_rows)
    target = jnp.where(copied, target, num_rows)
    flat = kv_pages.reshape(num_rows, row_size)
    rows = flat.at[source].get(mode="clip")
    return flat.at[target].set(rows, mode="drop").reshape(kv_pages.shape)


def _flat_rows(table, rows, pool_shape):
    """Returns row numbers of the flat pool [lanes, H, n]; P*H*ps where no page is."""
    num_pages, num_heads, page_size, _ = pool_shape
    lane = jnp.arange(table.shape[0])[:, None, None]
    head = jnp.arange(num_heads)[:, None]
    page = table.at[lane, rows // page_size].get(mode="fill", fill_value=num_pages)
    flat = (page * num_heads + head) * page_size + rows % page_size
    is_page = (page >= 0) & (page < num_pages)
    return jnp.where(is_page, flat, num_pages * num_heads * page_size)

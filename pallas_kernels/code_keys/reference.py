"""The specification of the coding of keys, in plain jnp."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import KeyCodes, KvPages, PageTable, PerLane
from pallas_kernels.score_select.codes import CodeLayout, encode


@functools.partial(jax.jit, static_argnames=("layout", "most"))
def code_keys_reference(
    codes: KeyCodes,
    kv_pages: KvPages,
    page_table: PageTable,
    starts: PerLane,
    ends: PerLane,
    *,
    layout: CodeLayout,
    most: int,
) -> KeyCodes:
    """Returns what `api.code_keys` documents; no checks. `most` groups of a lane."""
    num_pages, size = codes.shape[0], layout.head_size
    group = starts[:, None] // layout.group + jnp.arange(most)
    first = group * layout.group
    is_coded = (first < ends[:, None]) & (starts < ends)[:, None]
    column, part = group // layout.groups, group % layout.groups
    page = jnp.take_along_axis(
        page_table, column, axis=1, mode="fill", fill_value=num_pages
    )
    is_page = is_coded & (page >= 0) & (page < num_pages)
    page = jnp.where(is_page, page, num_pages)
    keys = kv_pages[..., :size].reshape(*codes.shape[:3], layout.group, size)
    keys = keys.at[page, :, part].get(mode="clip")  # [lanes, most, H, group, D]
    position = first[..., None] + jnp.arange(layout.group)
    is_used = (position < ends[:, None, None])[:, :, None]
    is_used = jnp.broadcast_to(is_used, keys.shape[:-1])
    return codes.at[page, :, part].set(encode(keys, is_used, layout), mode="drop")

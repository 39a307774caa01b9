"""Public entry of the KV row gather: argument checks, choice of implementation."""

import jax.numpy as jnp

from pallas_kernels.array_types import (
    Counts,
    CountsOfLayers,
    Indices,
    IndicesOfLayers,
    KvPages,
    PageTable,
    TargetTable,
)
from pallas_kernels.common import (
    check_dtype,
    check_pool,
    check_shape,
    default_impl,
    load_implementation,
)


def gather_kv(
    kv_pages: KvPages,
    source_table: PageTable,
    target_table: TargetTable,
    indices: Indices,
    counts: Counts,
    *,
    impl: str | None = None,
) -> KvPages:
    """Returns the pool with the selected rows copied behind each other.

    For every lane and KV head, row `indices[lane, h, n]` of the source table goes to
    row `n` of the target table for `n < counts[lane, h]`, bit for bit; nothing else
    changes. Row `r` of a table is `kv_pages[table[lane, r // ps], h, r % ps]`. Rows
    for a target page outside `[0, P)` are dropped; selected source pages are inside.

    The pool is written in place when the jitted caller donates it and does not read
    the old value afterwards.

    Args:
      kv_pages: [P, H, ps, 2*D], bfloat16 or float32.
      source_table: int32 [lanes, W].
      target_table: int32 [lanes, Wd]. A page that receives rows appears once in all
        target tables and in no source table.
      indices: int32 [lanes, H, cap], rows below W * ps; or [lanes, 1, cap], one list
        for all heads (a selection per layer), whose rows of all heads the TPU kernel
        fetches by one copy.
      counts: int32 [lanes, H] or [lanes, 1], like indices; 0..min(cap, Wd * ps).
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes or dtypes that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    (pool,) = gather_kv_layers(
        (kv_pages,), source_table, target_table, indices[None], counts[None], impl=impl
    )
    return pool


def gather_kv_layers(
    pools: tuple[KvPages, ...],
    source_table: PageTable,
    target_table: TargetTable,
    indices: IndicesOfLayers,
    counts: CountsOfLayers,
    *,
    impl: str | None = None,
) -> tuple[KvPages, ...]:
    """`gather_kv` in the pools of several layers, in one launch where that is faster.

    Args:
      pools: L pools of one shape and dtype, each with pages of the same tables.
      source_table, target_table: as in `gather_kv`, for all layers.
      indices: int32 [L, lanes, H or 1, cap].
      counts: int32 [L, lanes, H or 1].
      impl: as in `gather_kv`.

    Raises: as `gather_kv`.
    """
    check_pool(pools[0])
    kinds = {(pool.shape, pool.dtype) for pool in pools}
    if len(kinds) > 1:
        raise ValueError(f"pools differ in shape or dtype: {sorted(map(str, kinds))}")
    num_layers, num_heads = len(pools), pools[0].shape[1]
    check_shape("source_table", source_table, (None, None), "[lanes, W]")
    lanes = source_table.shape[0]
    check_shape("target_table", target_table, (lanes, None), "[lanes, Wd]")
    num_lists = 1 if indices.shape[2:3] == (1,) else num_heads
    meaning = "[L, lanes, H, cap], or [L, lanes, 1, cap] for all heads"
    check_shape("indices", indices, (num_layers, lanes, num_lists, None), meaning)
    meaning = "[L, lanes, H or 1], like indices"
    check_shape("counts", counts, (num_layers, lanes, num_lists), meaning)
    for name, array in (
        ("source_table", source_table),
        ("target_table", target_table),
        ("indices", indices),
        ("counts", counts),
    ):
        check_dtype(name, array, jnp.int32)
        if 0 in array.shape:
            raise ValueError(f"{name} has shape {array.shape}: no axis may be empty")
    impl = default_impl() if impl is None else impl
    function = load_implementation("pallas_kernels.gather_kv", "gather_kv", impl)
    tables = source_table, target_table
    if impl.startswith("gpu"):  # which takes one list per head
        shape = num_layers, lanes, num_heads
        indices = jnp.broadcast_to(indices, (*shape, indices.shape[3]))
        return function(pools, *tables, indices, jnp.broadcast_to(counts, shape))
    return tuple(
        function(pool, *tables, indices[layer], counts[layer])
        for layer, pool in enumerate(pools)
    )

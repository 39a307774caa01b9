"""Gather of KV rows into draft pages for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per part of a target page, lane, KV head and layer: one asynchronous copy per
row brings the rows into shared memory, one copy stores them all. The pools are updated
in place. Layers share a launch, as that of few rows takes longer than their copies.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

_GROUP = 8  # rows whose pages are looked up together
_MAX_COLUMNS = 256  # elements of one row that one copy moves


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Tunables of one launch."""

    max_rows: int = 16  # rows of one CTA, at most a page


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("interpret", "config"))
def gather_kv_gpu(
    pools: tuple[jax.Array, ...],
    source_table: jax.Array,
    target_table: jax.Array,
    indices: jax.Array,
    counts: jax.Array,
    *,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: GatherConfig | None = None,
) -> tuple[jax.Array, ...]:
    """Returns what `api.gather_kv_layers` documents, computed on a Hopper GPU."""
    config = config or GatherConfig()
    num_pages, num_heads, ps, columns = pools[0].shape
    _, lanes, _, cap = indices.shape
    rows = math.gcd(ps, config.max_rows)
    width = math.gcd(columns, _MAX_COLUMNS)
    if rows % _GROUP:
        raise NotImplementedError(
            f"page_size is {ps}: the GPU kernel needs a multiple of {_GROUP}"
        )

    def body(source_ref, target_ref, index_ref, count_ref, *rest):
        *pool_refs, rows_s, bar = rest
        for layer, pool_ref in enumerate(pool_refs):

            @pl.when(lax.axis_index("lane") // lanes == layer)
            def _copy(layer=layer, pool_ref=pool_ref):
                refs = index_ref.at[layer], count_ref.at[layer], pool_ref
                copy_rows(source_ref, target_ref, *refs, rows_s, bar)

    def copy_rows(source_ref, target_ref, index_ref, count_ref, pool_ref, rows_s, bar):
        lane, head = lax.rem(lax.axis_index("lane"), lanes), lax.axis_index("head")
        first = lax.axis_index("chunk") * rows
        count = jnp.clip(count_ref[lane, head] - first, 0, rows)
        column = jnp.minimum(first // ps, target_ref.shape[1] - 1)
        target = target_ref[lane, column]
        count = jnp.where((target >= 0) & (target < num_pages), count, 0)

        def source_of(n):
            index = index_ref[lane, head, jnp.minimum(first + n, cap - 1)]
            index = jnp.where(n < count, index, 0)
            page = source_ref[lane, index // ps]
            is_row = (n < count) & (page >= 0) & (page < num_pages)
            return page, lax.rem(index, ps), is_row

        def load(group, num_loaded):
            sources = [source_of(group * _GROUP + i) for i in range(_GROUP)]
            for i, (page, row, is_row) in enumerate(sources):
                n = group * _GROUP + i

                @pl.when(is_row)
                def _copy(page=page, row=row, n=n):
                    for c in range(0, columns, width):
                        plgpu.copy_gmem_to_smem(
                            pool_ref.at[page, head, row, pl.ds(c, width)],
                            rows_s.at[n, pl.ds(c, width)],
                            bar,
                        )

                @pl.when(jnp.logical_not(is_row))
                def _skip():
                    for _ in range(0, columns, width):
                        plgpu.barrier_arrive(bar)

                num_loaded += is_row.astype(jnp.int32)
            return num_loaded

        @pl.when(count > 0)
        def _work():
            num_loaded = lax.fori_loop(0, rows // _GROUP, load, jnp.int32(0))
            plgpu.barrier_wait(bar)
            to = pl.multiple_of(lax.rem(first, ps), rows)

            @pl.when(num_loaded == rows)
            def _store_all():
                for c in range(0, columns, width):
                    part = pl.ds(c, width)
                    plgpu.copy_smem_to_gmem(
                        rows_s.at[:, part],
                        pool_ref.at[target, head, pl.ds(to, rows), part],
                    )

            @pl.when(num_loaded < rows)
            def _store_some():
                def store(n, _):
                    @pl.when(source_of(n)[2])
                    def _store():
                        for c in range(0, columns, width):
                            part = pl.ds(c, width)
                            plgpu.copy_smem_to_gmem(
                                rows_s.at[n, part],
                                pool_ref.at[target, head, to + n, part],
                            )

                lax.fori_loop(0, rows, store, None)

            plgpu.wait_smem_to_gmem(0)

    pool_refs = [jax.new_ref(pool) for pool in pools]
    plgpu.kernel(
        body,
        out_type=(),
        grid=(len(pools) * lanes, num_heads, -(-cap // rows)),
        grid_names=("lane", "head", "chunk"),
        kernel_name="gather_kv",
        scratch_types=[
            plgpu.SMEM((rows, columns), pools[0].dtype),
            plgpu.Barrier(num_arrivals=rows * (columns // width)),
        ],
        # No thread reads what it wrote: only copies touch the rows.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams()
        if interpret is True
        else interpret or None,
    )(source_table, target_table, indices, counts, *pool_refs)
    return tuple(jax.freeze(ref) for ref in pool_refs)

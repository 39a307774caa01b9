"""Gather of KV rows into draft pages for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per part of a target page, lane, KV head and layer. Each of its warps looks up
some rows, brings them into shared memory by one asynchronous copy each and stores them
by one copy. The pools are updated in place. Layers share a launch, as that of few rows
takes longer than their copies.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import (
    CountsOfLayers,
    IndicesOfLayers,
    KvPages,
    PageTable,
    TargetTable,
)
from pallas_kernels.gpu_layouts import interpreter_of

_MIN_ROWS = 8  # of one CTA
_WARPS = 4  # of a CTA
_MAX_COLUMNS = 256  # elements of one row that one copy moves


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Tunables of one launch."""

    max_rows: int = 16  # rows of one CTA, at most a page


# Compiled once for all layers of a model.
@functools.partial(jax.jit, static_argnames=("interpret", "config"))
def gather_kv_gpu(
    pools: tuple[KvPages, ...],
    source_table: PageTable,
    target_table: TargetTable,
    indices: IndicesOfLayers,
    counts: CountsOfLayers,
    *,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: GatherConfig | None = None,
) -> tuple[KvPages, ...]:
    """Returns what `api.gather_kv_layers` documents, computed on a Hopper GPU."""
    config = config or GatherConfig()
    num_pages, num_heads, ps, columns = pools[0].shape
    _, lanes, _, cap = indices.shape
    rows = math.gcd(ps, config.max_rows)
    if rows % _MIN_ROWS:
        raise NotImplementedError(
            f"page_size is {ps}: the GPU kernel needs a multiple of {_MIN_ROWS}"
        )
    per_warp, width = rows // _WARPS, math.gcd(columns, _MAX_COLUMNS)
    parts = [pl.ds(c, width) for c in range(0, columns, width)]

    def body(source_ref, target_ref, index_ref, count_ref, *rest):
        *pool_refs, rows_s, bars = rest
        layer = lax.div(lax.axis_index("lane"), lanes)
        lane, head = lax.rem(lax.axis_index("lane"), lanes), lax.axis_index("head")
        in_pool = [(layer == i, pool) for i, pool in enumerate(pool_refs)]

        def copy_rows(warp):
            """Copies the rows of one warp, `per_warp` of one page."""
            start = warp * per_warp
            first = lax.axis_index("chunk") * rows + start
            last = jnp.minimum(count_ref[layer, lane, head], cap) - 1
            column = jnp.minimum(lax.div(first, ps), target_ref.shape[1] - 1)
            target = target_ref[lane, column]
            is_page = (target >= 0) & (target < num_pages)

            @pl.when((first <= last) & is_page)
            def _copy():
                # All of a step before the next: the loads wait for memory together.
                # Past the last row it is read again, and not stored.
                places = [jnp.minimum(first + n, last) for n in range(per_warp)]
                chosen = [index_ref[layer, lane, head, place] for place in places]
                pages = [source_ref[lane, lax.div(index, ps)] for index in chosen]
                load(pages, chosen, start)
                plgpu.barrier_wait(bars.at[warp])
                kept = [
                    (first + n <= last) & (page >= 0) & (page < num_pages)
                    for n, page in enumerate(pages)
                ]
                to = lax.rem(first, ps)
                store(kept, target, to, start)
                plgpu.wait_smem_to_gmem(0)

        def load(pages, chosen, start):
            for is_mine, pool in in_pool:

                @pl.when(is_mine)
                def _load(pool=pool):
                    for n, (page, index) in enumerate(zip(pages, chosen, strict=True)):
                        page = jnp.clip(page, 0, num_pages - 1)
                        for part in parts:
                            plgpu.copy_gmem_to_smem(
                                pool.at[page, head, lax.rem(index, ps), part],
                                rows_s.at[start + n, part],
                                bars.at[lax.div(start, per_warp)],
                                # An address is enough, no descriptor is fetched.
                                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                            )

        def store(kept, target, to, start):
            num_kept = sum(is_kept.astype(jnp.int32) for is_kept in kept)
            for is_mine, pool in in_pool:

                @pl.when(is_mine & (num_kept == per_warp))
                def _store_all(pool=pool):
                    for part in parts:
                        plgpu.copy_smem_to_gmem(
                            rows_s.at[pl.ds(start, per_warp), part],
                            pool.at[target, head, pl.ds(to, per_warp), part],
                        )

                @pl.when(is_mine & (num_kept < per_warp))
                def _store_some(pool=pool):
                    for n, is_kept in enumerate(kept):

                        @pl.when(is_kept)
                        def _store(n=n):
                            for part in parts:
                                plgpu.copy_smem_to_gmem(
                                    rows_s.at[start + n, part],
                                    pool.at[target, head, to + n, part],
                                )

        plgpu.warp_map(copy_rows)

    pool_refs = [jax.new_ref(pool) for pool in pools]
    plgpu.kernel(
        body,
        out_type=(),
        grid=(len(pools) * lanes, num_heads, -(-cap // rows)),
        grid_names=("lane", "head", "chunk"),
        kernel_name="gather_kv",
        scratch_types=[
            plgpu.SMEM((rows, columns), pools[0].dtype),
            plgpu.Barrier(num_arrivals=per_warp * len(parts), num_barriers=_WARPS),
        ],
        # No thread reads what it wrote: only copies touch the rows.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpreter_of(interpret),
    )(source_table, target_table, indices, counts, *pool_refs)
    return tuple(jax.freeze(ref) for ref in pool_refs)

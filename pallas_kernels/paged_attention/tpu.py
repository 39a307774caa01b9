"""Paged attention for TPU (Pallas Mosaic TPU).

One call per lane group; draft, verify and prefill groups differ only in static
sizes. A lane with many queries is cut into tiles of queries, each a lane of its own
over the same pages. A grid step handles one tile and `heads` KV heads: it streams the
pages of the tile through two buffers, and fetches the first block of the next step
while it works on its own last one, so that short draft lanes do not wait for memory
at every step.

The mass needs the final softmax sums of every row. The masked logits of the step stay
in VMEM and are turned into probabilities once the last key is seen: exact, in the
same pass over the pool.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.array_types import KvPagesOfD, PageTable, PerHead, PerLane, Queries
from pallas_kernels.common import MASK_VALUE
from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup
from pallas_kernels.paged_attention.tpu_sizes import (
    DEFAULT_TUNING,
    LANES,
    VMEM_HEADROOM_BYTES,
    Sizes,
    Tuning,
    check_supported,
    plan_sizes,
)


def paged_attention_tpu(
    q: Queries,
    kv_pages: KvPagesOfD,
    page_table: PageTable,
    kv_lengths: PerHead,
    q_lengths: PerLane,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
    interpret: bool | pltpu.InterpretParams = False,
    tuning: Tuning = DEFAULT_TUNING,
) -> AttentionOutput:
    """Returns what `api.paged_attention` documents.

    Raises:
      NotImplementedError: 2*D is not a multiple of 128, or the page size is not a
        multiple of 8 (float32) or 16 (bfloat16).
    """
    check_supported(kv_pages)
    num_q_heads, head_size = q.shape[1:]
    scale = head_size**-0.5 if scale is None else scale
    outs, mass, lane, token = [], None, 0, 0
    for index, (num_lanes, num_queries, _) in enumerate(groups):
        lanes = slice(lane, lane + num_lanes)
        tokens = slice(token, token + num_lanes * num_queries)
        sizes = plan_sizes(
            kv_pages.shape,
            kv_pages.dtype,
            table_width=page_table.shape[1],
            num_q_heads=num_q_heads,
            num_queries=num_queries,
            with_mass=index == mass_group,
            tuning=tuning,
        )
        out, group_mass = _attend_group(
            q[tokens].reshape(num_lanes, num_queries, num_q_heads, head_size),
            kv_pages,
            page_table[lanes],
            kv_lengths[lanes],
            q_lengths[lanes],
            sizes,
            scale,
            mass_rows,
            interpret,
        )
        outs.append(out.reshape(-1, num_q_heads, head_size))
        mass = group_mass if index == mass_group else mass
        lane, token = lanes.stop, tokens.stop
    return AttentionOutput(outs[0] if len(outs) == 1 else jnp.concatenate(outs), mass)


def _attend_group(
    q, kv_pages, page_table, kv_lengths, q_lengths, sizes, scale, mass_rows, interpret
):
    """Returns out [lanes, Q, N, D] and mass [lanes, H, W*ps] (or None)."""
    num_lanes = q.shape[0]
    most = max(1, sizes.tuning.table_bytes // (4 * sizes.table_width))
    outs, masses = [], []
    for first in range(0, num_lanes, most):  # the page table must fit in SMEM
        part = slice(first, first + most)
        out, mass = _attend_lanes(
            q[part],
            kv_pages,
            page_table[part],
            kv_lengths[part],
            q_lengths[part],
            sizes,
            scale,
            mass_rows,
            interpret,
        )
        outs.append(out)
        masses.append(mass)
    if len(outs) == 1:
        return outs[0], masses[0]
    return jnp.concatenate(outs), jnp.concatenate(masses) if sizes.with_mass else None


def _attend_lanes(
    q, kv_pages, page_table, kv_lengths, q_lengths, sizes, scale, mass_rows, interpret
):
    s = sizes
    num_lanes, num_queries = q.shape[:2]
    num_tiles, group_size = s.num_tiles, s.group_size
    steps = num_lanes * num_tiles
    # Rows of one KV head side by side: [steps, H, rows, q_width].
    padding = num_tiles * s.tile - num_queries
    q = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0)))
    q = q.reshape(steps, s.tile, s.num_heads, group_size, s.head_size)
    q = q.transpose(0, 2, 1, 3, 4).reshape(steps, s.num_heads, -1, s.head_size)
    padding = s.rows - s.tile * group_size
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, s.q_width - s.head_size)))

    out, mass = _call(
        q,
        kv_pages,
        _step_scalars(page_table, kv_lengths, q_lengths, s, mass_rows),
        s,
        scale,
        mass_rows,
        interpret,
    )
    out = out[:, :, : s.tile * group_size]
    out = out.reshape(steps, s.num_heads, s.tile, group_size, s.head_size)
    out = out.transpose(0, 2, 1, 3, 4)
    out = out.reshape(num_lanes, num_tiles * s.tile, -1, s.head_size)[:, :num_queries]
    if mass is not None:
        mass = mass.reshape(num_lanes, num_tiles, s.num_heads, -1)
        mass = mass[:, 0] if num_tiles == 1 else mass.sum(1)
        mass = mass[:, :, : s.table_width * s.page_size]
    return out, mass


class _Scalars(NamedTuple):
    """What the kernel reads from SMEM; every array flat."""

    page_table: jax.Array  # [lanes * W]
    num_pages: jax.Array  # [steps * H / heads] pages of a grid step
    visible: jax.Array  # [steps * H] keys the last valid query of a tile sees
    num_queries: jax.Array  # [steps] valid queries of a tile
    last_query: jax.Array  # [steps] last valid query of the lane, within this tile
    candidates: jax.Array  # [steps * H] keys that get mass
    weight: jax.Array  # [steps] float32, of one row in the mean


def _step_scalars(page_table, kv_lengths, q_lengths, s: Sizes, mass_rows) -> _Scalars:
    first = jnp.arange(s.num_tiles, dtype=jnp.int32) * s.tile
    valid = jnp.clip(q_lengths[:, None] - first, 0, s.tile)  # [lanes, tiles]
    candidates = kv_lengths - q_lengths[:, None]
    visible = candidates[:, None] + (first + valid)[:, :, None]
    visible = jnp.where(valid[:, :, None] > 0, jnp.maximum(visible, 0), 0)
    longest = visible.reshape(-1, s.num_heads // s.heads, s.heads).max(-1)
    used = jnp.minimum(q_lengths, 2) if mass_rows == "edges" else q_lengths
    weight = 1.0 / jnp.maximum(used * s.group_size, 1).astype(jnp.float32)
    by_tile = (kv_lengths.shape[0], s.num_tiles)
    candidates = jnp.broadcast_to(candidates[:, None], (*by_tile, s.num_heads))
    return _Scalars(
        page_table=page_table.reshape(-1),
        num_pages=((longest + s.page_size - 1) // s.page_size).reshape(-1),
        visible=visible.reshape(-1),
        num_queries=valid.reshape(-1),
        last_query=(q_lengths[:, None] - 1 - first).reshape(-1),
        candidates=candidates.reshape(-1),
        weight=jnp.broadcast_to(weight[:, None], by_tile).reshape(-1),
    )


def _call(q, kv_pages, scalars, s: Sizes, scale, mass_rows, interpret):
    steps = q.shape[0]
    columns = s.num_blocks * s.block
    # Two cores that act as one device (v5p) take half of the steps each.
    cores = 2 if steps % 2 == 0 else 1
    core_steps = steps // cores

    def rows(width):
        return pl.BlockSpec(
            (1, s.heads, s.rows, width),
            lambda core, i, j, *_: (core * core_steps + i, j, 0, 0),
        )

    out_shape = [
        jax.ShapeDtypeStruct((steps, s.num_heads, s.rows, s.head_size), q.dtype)
    ]
    out_specs = [rows(s.head_size)]
    scratch = [
        pltpu.VMEM(
            (2, s.heads, s.block_pages, s.page_size, 2 * s.head_size), kv_pages.dtype
        ),
        pltpu.VMEM((s.heads, s.rows, s.q_width), jnp.float32),
        pltpu.VMEM((s.heads, s.rows, LANES), jnp.float32),
        pltpu.VMEM((s.heads, s.rows, LANES), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2,)),
    ]
    if s.with_mass:
        out_shape.append(
            jax.ShapeDtypeStruct((steps, s.num_heads, columns), jnp.float32)
        )
        out_specs.append(
            pl.BlockSpec(
                (1, s.num_heads, columns),
                lambda core, i, j, *_: (core * core_steps + i, 0, 0),
            )
        )
        scratch.append(
            pltpu.VMEM((s.heads, s.num_blocks, s.rows, s.block), jnp.float32)
        )
    kernel = functools.partial(
        _kernel,
        s=s,
        scale=scale,
        only_edges=mass_rows == "edges",
        unroll=1 if interpret else s.head_unroll,
    )
    result = pl.pallas_call(
        kernel,
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(cores, core_steps, s.num_heads // s.heads),
            in_specs=[rows(s.q_width), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            # Steps hand each other a block in flight, so they stay in order.
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=s.vmem_bytes + VMEM_HEADROOM_BYTES,
        ),
        interpret=interpret,
        name="paged_attention",
    )(*scalars, q, kv_pages)
    return (*result, None)[:2]


def _kernel(*refs, s: Sizes, scale, only_edges, unroll):
    scalars, refs = (
        _Scalars(*refs[: len(_Scalars._fields)]),
        refs[len(_Scalars._fields) :],
    )
    q_ref, kv_ref, out_ref, *refs = refs
    mass_ref = refs.pop(0) if s.with_mass else None
    buffer, acc_ref, max_ref, sum_ref, slot_ref, sems, *logits_ref = refs
    core_step, part = pl.program_id(1), pl.program_id(2)
    step = pl.program_id(0) * pl.num_programs(1) + core_step
    num_parts = s.num_heads // s.heads
    turn = step * num_parts + part
    is_first_turn = (core_step == 0) & (part == 0)
    is_last_turn = (core_step + 1 == pl.num_programs(1)) & (part + 1 == num_parts)
    pages = _PageStream(scalars, kv_ref, buffer, sems, s)

    @pl.when(is_first_turn)
    def _():
        slot_ref[0] = 0
        pages.start(turn, 0, 0)

    num_blocks = jnp.maximum(pl.cdiv(scalars.num_pages[turn], s.block_pages), 1)
    first_slot = slot_ref[0]
    acc_ref[...] = jnp.zeros_like(acc_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    max_ref[...] = jnp.full_like(max_ref, MASK_VALUE)

    def attend_block(i, _):
        slot = (first_slot + i) % 2
        is_last = i + 1 == num_blocks

        @pl.when(jnp.logical_not(is_last))
        def _():
            pages.start(turn, i + 1, 1 - slot)

        @pl.when(is_last & jnp.logical_not(is_last_turn))
        def _():
            pages.start(turn + 1, 0, 1 - slot)

        pages.wait(turn, i, slot)

        def head(j, _):
            logits = _attend_head(
                q_ref.at[0, j],
                buffer.at[slot, j],
                acc_ref.at[j],
                max_ref.at[j],
                sum_ref.at[j],
                first_key=i * s.block,
                visible=scalars.visible[step * s.num_heads + part * s.heads + j],
                num_queries=scalars.num_queries[step],
                s=s,
                scale=scale,
            )
            if s.with_mass:
                logits_ref[0][j, i] = logits

        jax.lax.fori_loop(0, s.heads, head, None, unroll=unroll)

    jax.lax.fori_loop(0, num_blocks, attend_block, None)
    slot_ref[0] = (first_slot + num_blocks) % 2

    def finish(j, _):
        total = sum_ref[j][:, :1]
        out = acc_ref[j] / jnp.where(total == 0.0, 1.0, total)
        out_ref[0, j] = out[:, s.q_width - s.head_size :].astype(out_ref.dtype)
        if s.with_mass:
            head = part * s.heads + j
            _store_mass(
                mass_ref.at[0, pl.ds(head, 1)],
                logits_ref[0].at[j],
                max_ref[j][:, :1],
                total,
                num_blocks=num_blocks,
                candidates=scalars.candidates[step * s.num_heads + head],
                last_query=scalars.last_query[step],
                is_first_tile=step % s.num_tiles == 0,
                weight=scalars.weight[step],
                s=s,
                only_edges=only_edges,
            )

    jax.lax.fori_loop(0, s.heads, finish, None)


class _PageStream(NamedTuple):
    """Copies of the pages of one block of one grid step into a buffer slot."""

    scalars: _Scalars
    kv_ref: jax.Ref
    buffer: jax.Ref
    sems: jax.Ref
    s: Sizes

    def start(self, turn, block, slot):
        self._for_each_page(turn, block, slot, lambda copy: copy.start())

    def wait(self, turn, block, slot):
        self._for_each_page(turn, block, slot, lambda copy: copy.wait())

    def _for_each_page(self, turn, block, slot, act):
        s = self.s
        num_parts = s.num_heads // s.heads
        step, part = turn // num_parts, turn % num_parts
        first = block * s.block_pages
        column = step // s.num_tiles * s.table_width + first

        def page(n, _):
            act(
                pltpu.make_async_copy(
                    self.kv_ref.at[
                        self.scalars.page_table[column + n],
                        pl.ds(part * s.heads, s.heads),
                    ],
                    self.buffer.at[slot, :, n],
                    self.sems.at[slot],
                )
            )

        count = jnp.minimum(self.scalars.num_pages[turn] - first, s.block_pages)
        jax.lax.fori_loop(0, count, page, None)


def _query_of_row(shape, group_size):
    """Returns row // group_size, without a vector division."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row * (65536 // group_size + 1)) >> 16  # exact for row < 65536 / G


def _attend_head(
    q_ref,  # [rows, q_width]
    kv_ref,  # [block_pages, page_size, 2D], one head of a block
    acc_ref,  # float32 [rows, q_width]
    max_ref,  # float32 [rows, 128], equal in all lanes
    sum_ref,  # float32 [rows, 128], equal in all lanes
    *,
    first_key,
    visible,
    num_queries,
    s: Sizes,
    scale,
):
    """Adds one block of keys to the softmax state; returns its masked logits."""
    shape = (s.block, 2 * s.head_size)

    @pl.when(first_key + s.block > visible)
    def _():
        # Rows past the length hold anything, NaN too: 0 * NaN would reach the sum.
        key = first_key + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        rows = kv_ref[...].reshape(shape)
        rows = jnp.where(key < visible, rows, jnp.zeros_like(rows))
        kv_ref[...] = rows.reshape(kv_ref.shape)

    rows = kv_ref[...].reshape(shape)
    k = rows if s.whole_rows else rows[:, : s.head_size]
    v = rows if s.whole_rows else rows[:, s.head_size :]
    exact = jax.lax.Precision.HIGHEST if k.dtype == jnp.float32 else None
    logits = scale * jax.lax.dot_general(
        q_ref[...],
        k,
        (((1,), (1,)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )
    key = first_key + jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    query = _query_of_row(logits.shape, s.group_size)
    seen = (key <= visible - num_queries + query) & (query < num_queries)
    logits = jnp.where(seen, logits, MASK_VALUE)
    old_max = max_ref[:, :1]
    new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
    p = jnp.where(seen, jnp.exp(logits - new_max), 0.0)
    shrink = jnp.exp(old_max - new_max)
    total = sum_ref[:, :1] * shrink + jnp.sum(p, axis=1, keepdims=True)
    acc_ref[...] = acc_ref[...] * shrink + jax.lax.dot(
        p.astype(v.dtype), v, precision=exact, preferred_element_type=jnp.float32
    )
    max_ref[...] = jnp.broadcast_to(new_max, max_ref.shape)
    sum_ref[...] = jnp.broadcast_to(total, sum_ref.shape)
    return logits


def _store_mass(
    mass_ref,  # float32 [1, num_blocks * block]
    logits_ref,  # float32 [num_blocks, rows, block]
    row_max,  # float32 [rows, 1]
    row_sum,  # float32 [rows, 1]
    *,
    num_blocks,
    candidates,
    last_query,
    is_first_tile,
    weight,
    s: Sizes,
    only_edges,
):
    """Writes the mean probability of each key over the used rows of this tile."""
    query = _query_of_row(row_sum.shape, s.group_size)
    used = query <= last_query
    if only_edges:
        used &= ((query == 0) & is_first_tile) | (query == last_query)
    used &= row_sum > 0.0
    factor = jnp.where(used, weight / jnp.where(used, row_sum, 1.0), 0.0)

    def block(i, _):
        start = pl.multiple_of(i * s.block, LANES)

        @pl.when(i < num_blocks)
        def _():
            p = jnp.exp(logits_ref[i] - row_max) * factor
            mass = jnp.sum(p, axis=0, keepdims=True)
            key = start + jax.lax.broadcasted_iota(jnp.int32, mass.shape, 1)
            mass = jnp.where(key < candidates, mass, 0.0)
            mass_ref[:, pl.ds(start, s.block)] = mass

        @pl.when(i >= num_blocks)
        def _():
            mass_ref[:, pl.ds(start, s.block)] = jnp.zeros((1, s.block), jnp.float32)

    jax.lax.fori_loop(0, s.num_blocks, block, None)

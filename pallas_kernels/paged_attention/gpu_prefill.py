"""Attention of prompt chunks for Hopper GPUs.

A lane of many queries is bound by the matrix unit, and by how often keys are read from
L2. One CTA takes some row tiles of one lane and KV head, a warpgroup each, which share
every block of keys in shared memory; one more warpgroup copies the blocks. Keys are not
split over CTAs, so results go straight to the output. Two computing warpgroups take
turns: while one multiplies, the other computes its softmax (FlashAttention-3, arXiv
2407.08608, section 3.1), and each weighs a block while values of the one before it are
added (section 3.2).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.gpu_layouts import TILED_ROWS, WGMMA, WGMMA_ROWS
from pallas_kernels.paged_attention.gpu_chunk import (
    ChunkSpec,
    Copier,
    Tile,
    lane_order,
    tile_of,
)
from pallas_kernels.paged_attention.gpu_layout import TILE, full

_SWIZZLED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_AS_THEY_LIE = (plgpu.TilingTransform((1, 64)),)


@dataclasses.dataclass(frozen=True, eq=False)
class _Consumer:
    """One warpgroup that computes up to 64 rows."""

    spec: ChunkSpec
    tile: Tile
    index: jax.Array  # among those of the CTA
    queries: Any  # [T, N, D]
    out: Any  # [T, N, D]
    k_s: Any
    v_s: Any
    k_bar: Any
    v_bar: Any
    k_free: Any
    v_free: Any
    rows_s: Any  # [64, D], queries, then results, as they lie in memory
    tile_s: Any  # [64, D], the same for the matrix unit
    q_bar: Any
    turn_bar: Any  # or None
    weight_s: Any  # [64, keys], or None: the interpreter multiplies shared memory only

    @property
    def first_query(self):
        """First query of this warpgroup."""
        return self.tile.first_query + self.index * self.spec.step

    @property
    def num_queries(self):
        """Queries of this warpgroup that exist."""
        return jnp.clip(self.spec.num_queries - self.first_query, 0, self.spec.step)

    def tokens(self, array, i):
        """Returns the rows of the i-th query of this warpgroup in [T, N, D]."""
        spec = self.spec
        token = spec.first_token + (self.tile.lane - spec.first_lane) * spec.num_queries
        heads = pl.ds(self.tile.head * spec.group_size, spec.group_size)
        return array.at[token + self.first_query + i, heads]

    def place_queries(self):
        """Copies the queries to where the matrix unit reads them."""
        spec = self.spec

        def copy(i, _):
            plgpu.copy_gmem_to_smem(
                self.tokens(self.queries, i),
                self.rows_s.at[pl.ds(i * spec.group_size, spec.group_size)],
                self.q_bar,
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

        def skip(i, _):
            plgpu.barrier_arrive(self.q_bar)

        lax.fori_loop(0, self.num_queries, copy, None)
        lax.fori_loop(self.num_queries, spec.step, skip, None)
        plgpu.barrier_wait(self.q_bar)
        self.tile_s[...] = plgpu.load(self.rows_s, layout=TILED_ROWS, optimized=False)
        plgpu.commit_smem()

    def take_turn(self):
        """Waits until the other warpgroup has asked for its products."""
        if self.turn_bar is not None:
            plgpu.barrier_wait(self.turn_bar.at[self.index])

    def give_turn(self):
        """Lets the other warpgroup multiply."""
        if self.turn_bar is not None:
            plgpu.barrier_arrive(self.turn_bar.at[1 - self.index])

    @property
    def base(self):
        """Keys before the first query of this warpgroup."""
        return self.tile.kv_len - self.tile.q_len + self.first_query

    def softmax(self, s, m, total, first_key, is_edge):
        """Returns weights of a block, what shrinks older sums, maximum and sum."""
        if is_edge:
            row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=WGMMA_ROWS)
            last = self.base - first_key + lax.div(row, self.spec.group_size)
            key = plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=WGMMA)
            is_seen = key <= lax.broadcast_in_dim(last, s.shape, [0])
            s = jnp.where(is_seen, s, MASK_VALUE)
        m_new = jnp.maximum(m, s.max(axis=1) * self.spec.scale)
        alpha = jnp.exp2(m - m_new)
        m_rows = lax.broadcast_in_dim(m_new, s.shape, [0])
        p = jnp.exp2(s * self.spec.scale - m_rows)
        total = total * alpha + p.sum(axis=1)
        return p, alpha, m_new, total

    def multiply_keys(self, slot):
        """Returns the products of all rows with the keys of a slot."""

        def multiply(s_ref):
            plgpu.wgmma(s_ref, self.tile_s, self.k_s.at[slot].T)
            self.give_turn()
            return s_ref[...]

        shape = (TILE, self.spec.config.block_keys)
        return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))

    def multiply_both(self, acc, weights, slot, next_slot, weigh):
        """Returns the sum with the values of a slot, and `weigh` of the next products.

        The products are asked for first: they are weighed while values are added.
        """
        if self.spec.interpret:
            acc = self.add_values(acc, weights, slot)
            return acc, weigh(self.multiply_keys(next_slot))

        def multiply(acc_ref, s_ref):
            acc_ref[...] = acc
            plgpu.wgmma(s_ref, self.tile_s, self.k_s.at[next_slot].T)
            plgpu.wgmma(acc_ref, weights, self.v_s.at[slot])
            self.give_turn()
            in_flight = int(self.spec.config.overlaps)
            weighed = weigh(plgpu.wgmma_accumulator_load(s_ref, wait_n=in_flight))
            return acc_ref[...], weighed

        shapes = acc.shape, (TILE, self.spec.config.block_keys)
        return pl.run_scoped(multiply, *(plgpu.ACC(s, jnp.float32) for s in shapes))

    def add_values(self, acc, weights, slot):
        """Returns the sum of values with those of a slot."""
        values = self.v_s.at[slot]
        if not self.spec.interpret:
            return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values))(
                plgpu.ACC.init(acc)
            )
        self.weight_s[...] = weights
        plgpu.commit_smem()

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, self.weight_s, values)
            return acc_ref[...]

        return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, acc.dtype))

    def slot(self, block):
        """Returns where a block lies in shared memory."""
        return lax.rem(block, self.spec.config.num_stages)

    def attend(self):
        """Returns sum of values, maximum and sum of all rows over all blocks."""
        keys, last = self.spec.config.block_keys, self.tile.num_blocks - 1

        def step(is_edge, block, carry):
            weights, acc, m, total = carry
            slot, next_slot = self.slot(block), self.slot(block + 1)
            plgpu.barrier_wait(self.k_bar.at[next_slot])
            plgpu.barrier_wait(self.v_bar.at[slot])
            self.take_turn()

            def weigh(s):
                plgpu.barrier_arrive(self.k_free.at[next_slot])
                return self.softmax(s, m, total, (block + 1) * keys, is_edge)

            acc, weighed = self.multiply_both(acc, weights, slot, next_slot, weigh)
            plgpu.barrier_arrive(self.v_free.at[slot])
            weights, alpha, m, total = weighed
            # Not before the values are added: the matrix unit still reads the old ones.
            acc, weights = lax.optimization_barrier((acc, weights))
            weights = weights.astype(self.spec.dtype)
            return weights, acc * lax.broadcast_in_dim(alpha, acc.shape, [0]), m, total

        plgpu.barrier_wait(self.k_bar.at[0])

        @pl.when(self.index == 1)
        def _let_first_begin():
            self.give_turn()

        self.take_turn()
        s = self.multiply_keys(0)
        plgpu.barrier_arrive(self.k_free.at[0])
        acc = full((TILE, self.spec.head_size), 0.0, WGMMA)
        m = full((TILE,), MASK_VALUE, WGMMA_ROWS)
        total = full((TILE,), 0.0, WGMMA_ROWS)
        weights, _, m, total = self.softmax(s, m, total, 0, True)
        carry = weights.astype(self.spec.dtype), acc, m, total
        # Of the blocks from the second on, that every row sees in full.
        seen = lax.div(jnp.maximum(self.base + 1, 0), keys) - 1
        seen = jnp.clip(seen, 0, last)
        carry = lax.fori_loop(0, seen, functools.partial(step, False), carry)
        carry = lax.fori_loop(seen, last, functools.partial(step, True), carry)
        weights, acc, m, total = carry
        slot = self.slot(last)
        plgpu.barrier_wait(self.v_bar.at[slot])
        self.take_turn()
        acc = self.add_values(acc, weights, slot)

        @pl.when(self.index == 0)
        def _let_second_end():
            self.give_turn()

        plgpu.barrier_arrive(self.v_free.at[slot])
        return acc, m, total

    def place_results(self, acc, m, total):
        """Puts normalised rows where they can be copied; zeros without a key."""
        row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=WGMMA)
        first = -self.base * self.spec.group_size
        end = (self.tile.q_len - self.first_query) * self.spec.group_size
        is_used = (row >= first) & (row < end)
        rows = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        rows = jnp.where(is_used, rows, 0.0)
        self.tile_s[...] = rows.astype(self.spec.dtype)
        plgpu.commit_smem()
        self.rows_s[...] = plgpu.load(self.tile_s, layout=TILED_ROWS, optimized=False)

    def run(self):
        """Computes all rows of this warpgroup and copies them to the output."""

        @pl.when(self.tile.num_blocks > 0)
        def _attend():
            self.place_queries()
            self.place_results(*self.attend())

        @pl.when(self.tile.num_blocks == 0)
        def _clear():
            shape, dtype = self.rows_s.shape, self.spec.dtype
            zeros = plgpu.layout_cast(jnp.zeros(shape, dtype), TILED_ROWS)
            self.rows_s[...] = zeros

        plgpu.commit_smem()
        group_size = self.spec.group_size

        def copy(i, _):
            rows = self.rows_s.at[pl.ds(i * group_size, group_size)]
            plgpu.copy_smem_to_gmem(rows, self.tokens(self.out, i))

        lax.fori_loop(0, self.num_queries, copy, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def attend_chunks(
    spec: ChunkSpec, kv_lengths, q_lengths, page_table, q, kv_pages, out
) -> None:
    """Writes the output of one lane group into `out`, a reference of [T, N, D].

    kv_lengths int32 [lanes, H], q_lengths int32 [lanes] and page_table int32 [lanes, W]
    are those of all groups.
    """
    config = spec.config
    lanes = slice(spec.first_lane, spec.first_lane + spec.num_lanes)
    order = lane_order(kv_lengths[lanes], q_lengths[lanes])
    consumers = config.num_consumers

    def entry(order, kv_lengths, q_lengths, table, queries, pages, out, *scratch):
        k_s, v_s, rows_s, tile_s, weight_s, *bars = scratch
        k_bar, v_bar, k_free, v_free, tail_bar, q_bar, turn_bar = bars
        tile = tile_of(spec, lax.axis_index("work"), order, kv_lengths, q_lengths)
        index = lax.axis_index("warpgroup")
        shared = k_s, v_s, k_bar, v_bar, k_free, v_free

        @pl.when(index < consumers)
        def _compute():
            plgpu.set_max_registers(config.registers, action="increase")
            own = (rows_s.at[index], tile_s.at[index], q_bar.at[index], turn_bar)
            weights = weight_s if weight_s is None else weight_s.at[index]
            _Consumer(spec, tile, index, queries, out, *shared, *own, weights).run()

        @pl.when(index == consumers)
        def _copy():
            plgpu.set_max_registers(config.copy_registers, action="decrease")
            Copier(spec, tile, table, pages, *shared, tail_bar).run()

    plgpu.kernel(
        entry,
        out_type=(),
        grid=(spec.num_lanes * spec.tiles_per_lane * spec.num_heads,),
        grid_names=("work",),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        kernel_name="paged_attention_chunks",
        scratch_types=_scratch(spec),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=spec.interpret,
    )(order, kv_lengths, q_lengths, page_table, q, kv_pages, out)


def _scratch(spec: ChunkSpec) -> list:
    """Returns the shared memory and the barriers of one CTA."""
    config, D, dtype = spec.config, spec.head_size, spec.dtype
    stages, consumers = config.num_stages, config.num_consumers
    blocks = plgpu.SMEM((stages, config.block_keys, D), dtype, transforms=_SWIZZLED)
    arrived = plgpu.Barrier(num_arrivals=spec.copies, num_barriers=stages)
    free = plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)
    weights = plgpu.SMEM(
        (consumers, TILE, config.block_keys), dtype, transforms=_SWIZZLED
    )
    return [
        blocks,
        blocks,
        plgpu.SMEM((consumers, TILE, D), dtype, transforms=_AS_THEY_LIE),
        plgpu.SMEM((consumers, TILE, D), dtype, transforms=_SWIZZLED),
        weights if spec.interpret else None,
        arrived,
        arrived,
        free,
        free,
        plgpu.Barrier(num_arrivals=spec.copies),
        plgpu.Barrier(num_arrivals=spec.step, num_barriers=consumers),
        plgpu.Barrier(num_barriers=consumers) if config.takes_turns else None,
    ]

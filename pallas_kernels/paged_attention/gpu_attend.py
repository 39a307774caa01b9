"""The persistent attention launch for Hopper GPUs.

Every CTA walks an equal, contiguous share of the stream of all 64-key blocks. The part
of a segment that it computes is written normalised, with the log of its sum.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    GROUP,
    TILE,
    Spec,
    Tile,
    edge_query,
    full,
    num_blocks,
    part_row,
    segment_start,
    shares,
    visible_keys,
)
from pallas_kernels.paged_attention.gpu_mass import pack

_WGMMA = plgpu.Layout.WGMMA
_WGMMA_ROWS = plgpu.Layout.WGMMA.reduce(1)
_SMALLEST = 2.0**-100  # of the largest probability of a row in a block
# A warp holds two half rows; what a thread holds are four neighbours.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 64), (2, 64), (4,))),
    warp_dims=(-5,),
    lane_dims=(-3, -2),
    vector_dim=-1,
)
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


class _Segment(NamedTuple):
    """One (row tile, KV head) pair."""

    index: jax.Array
    head: jax.Array
    tile: Tile
    q_len: jax.Array
    base: jax.Array  # keys that every query sees
    visible: jax.Array  # keys that some query of the tile sees


class _Cursor(NamedTuple):
    """The next block to copy."""

    segment: jax.Array
    block: jax.Array  # inside the segment
    visible: jax.Array  # keys of the segment
    lane: jax.Array
    page: jax.Array  # looked up ahead; used where a block lies in one page


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Attend:
    """The references of one CTA and what it does with them."""

    spec: Spec
    cta: jax.Array
    low: jax.Array  # share of the stream of blocks, half-open
    high: jax.Array
    ends: Any  # int32 [segments]
    kv_lengths: Any  # int32 [lanes, H]
    q_lengths: Any  # int32 [lanes]
    table: Any  # int32 [lanes, W]
    queries: Any  # [T, N, D]
    pages: Any  # [P, H, page_size, 2 * D]
    parts: Any  # out: [rows, D]
    log_sums: Any  # out: float32 [segments + CTAs, 64], base 2
    probabilities: Any  # out: int32 [segments, blocks, rows, words], or None
    maxima: Any  # out: float32 [segments, blocks, 64], or None
    q_s: Any
    kv_s: Any
    tile_s: Any
    mass_s: Any
    weight_s: Any
    q_bar: Any
    kv_bar: Any

    # ------------------------------------------------------------- work list

    def segment(self, index) -> _Segment:
        """Returns what belongs to a segment index."""
        tile = self.spec.tile(lax.div(index, self.spec.num_heads))
        head = lax.rem(index, self.spec.num_heads)
        q_len, kv_len = self.q_lengths[tile.lane], self.kv_lengths[tile.lane, head]
        visible = visible_keys(
            kv_len, q_len, tile.first_query, tile.num_queries, tile.has_edges
        )
        return _Segment(index, head, tile, q_len, kv_len - q_len, visible)

    def query_at(self, position, segment, q_len):
        """Returns the query at a position: edges stand in front where they weigh."""
        if self.spec.edge_group is None:
            return position
        first, last = self.spec.mass_segments
        is_edge = (segment >= first) & (segment < last)
        # With 1 as the last query the order is the natural one.
        return edge_query(position, jnp.where(is_edge, q_len - 1, 1))

    def next_segment(self, index):
        """Returns the first segment behind `index` that has keys."""
        end, last = self.ends[index], self.spec.num_segments - 1
        return lax.while_loop(
            lambda s: (s < last) & (self.ends[s] <= end),
            lambda s: s + 1,
            jnp.minimum(index + 1, last),
        )

    def cursor(self, index, block) -> _Cursor:
        """Returns the cursor at a block of a segment."""
        segment = self.segment(index)
        key = jnp.minimum(block * BLOCK, jnp.maximum(segment.visible - 1, 0))
        lane = segment.tile.lane
        return _Cursor(index, block, segment.visible, lane, self.page(lane, key))

    def page(self, lane, key):
        """Returns the page of a key."""
        return self.table[lane, lax.div(key, self.spec.page_size)]

    def advance(self, cursor: _Cursor) -> _Cursor:
        """Returns the cursor at the next block."""
        block = cursor.block + 1

        def stay():
            page = self.page(cursor.lane, block * BLOCK)
            return cursor._replace(block=block, page=page)

        return lax.cond(
            block < num_blocks(cursor.visible),
            stay,
            lambda: self.cursor(self.next_segment(cursor.segment), jnp.int32(0)),
        )

    # ----------------------------------------------------------------- copies

    def copy_block(self, i, cursor: _Cursor) -> _Cursor:
        """Starts the copies of the i-th block of this CTA; returns the next cursor."""
        page_size = self.spec.page_size
        copy_rows = min(self.spec.config.copy_rows, page_size)
        slot = lax.rem(i, self.spec.config.num_stages)
        head = lax.rem(cursor.segment, self.spec.num_heads)
        for first in range(0, BLOCK, copy_rows):
            key = cursor.block * BLOCK + first

            @pl.when(key < cursor.visible)
            def _copy(first=first, key=key):
                page = cursor.page
                if page_size < BLOCK:
                    page = self.page(cursor.lane, key)
                row = pl.multiple_of(lax.rem(key, page_size), copy_rows)
                plgpu.copy_gmem_to_smem(
                    self.pages.at[page, head, pl.ds(row, copy_rows)],
                    self.kv_s.at[slot, pl.ds(first, copy_rows)],
                    self.kv_bar.at[slot],
                )

            @pl.when(key >= cursor.visible)
            def _skip():
                plgpu.barrier_arrive(self.kv_bar.at[slot])

        return self.advance(cursor)

    def copy_block_if_mine(self, i, cursor: _Cursor) -> _Cursor:
        """Does `copy_block` unless block i belongs to the next CTA."""
        return lax.cond(
            self.low + i < self.high,
            functools.partial(self.copy_block, i),
            lambda cursor: cursor,
            cursor,
        )

    def copy_queries(self, index):
        """Starts the copies of the queries of a segment, one for each query."""
        group_size = self.spec.group_size
        tile = self.spec.tile(lax.div(index, self.spec.num_heads))
        head = lax.rem(index, self.spec.num_heads)
        q_len = self.q_lengths[tile.lane]

        def copy(i, _):
            query = self.query_at(tile.first_query + i, index, q_len)
            heads = pl.ds(head * group_size, group_size)
            plgpu.copy_gmem_to_smem(
                self.queries.at[tile.token + query, heads],
                self.q_s.at[pl.ds(i * group_size, group_size)],
                self.q_bar,
            )

        def skip(i, _):
            plgpu.barrier_arrive(self.q_bar)

        lax.fori_loop(0, tile.num_queries, copy, None)
        lax.fori_loop(tile.num_queries, self.spec.tile_queries, skip, None)

    # ------------------------------------------------------------------ maths

    def mask(self, logits, segment: _Segment, first_key):
        """Returns logits with the keys hidden that a row must not see."""
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=_WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=_WGMMA)
        query = segment.tile.first_query + row // self.spec.group_size
        query = self.query_at(query, segment.index, segment.q_len)
        limit = jnp.minimum(segment.base + query + 1, segment.visible)
        return jnp.where(key + first_key < limit, logits, MASK_VALUE)

    def zero_unused_values(self, segment: _Segment, values_s, first_key):
        """Clears value rows past the length: 0 * NaN would be NaN."""

        @pl.when(first_key + BLOCK > segment.visible)
        def _clear():
            values = plgpu.load(values_s, layout=_WGMMA, optimized=False)
            row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=_WGMMA)
            is_used = row < segment.visible - first_key
            values_s[...] = jnp.where(is_used, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def store_probabilities(self, p, m, top, segment: _Segment, block):
        """Keeps what the mass needs of one block; `top` is its largest logit."""
        count, bits = self.spec.mass_tile_rows, self.spec.config.mass_bits
        first, last = self.spec.mass_segments
        first_key = block * BLOCK

        def only_candidates(p, _):
            key = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=_WGMMA)
            p = jnp.where(key + first_key < segment.base, p, 0.0)
            return p, p.max(axis=1)

        @pl.when(
            (segment.index >= first)
            & (segment.index < last)
            & (first_key < segment.base)
        )
        def _store():
            is_last = first_key + BLOCK > segment.base
            kept, largest = lax.cond(
                is_last, only_candidates, lambda *p: p, p, jnp.exp2(top - m)
            )
            largest = jnp.maximum(largest, _SMALLEST)
            scale = ((1 << bits) - 1) / largest
            words = pack(kept * lax.broadcast_in_dim(scale, p.shape, [0]), bits)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            for i, word in enumerate(words):
                self.mass_s[:, pl.ds(i * GROUP, GROUP)] = word
            plgpu.commit_smem()
            index = segment.index - first
            plgpu.copy_smem_to_gmem(
                self.mass_s.at[pl.ds(0, count)], self.probabilities.at[index, block]
            )
            self.maxima[index, block] = m + jnp.log2(largest)

    def attend_block(self, segment: _Segment, block, slot, last_block, state):
        """Returns (sum of values, maximum, sum) of all rows with one more block."""
        spec = self.spec
        acc, m, total = state
        keys_s = self.kv_s.at[slot, :, pl.ds(0, spec.head_size)]
        values_s = self.kv_s.at[slot, :, pl.ds(spec.head_size, spec.head_size)]
        first_key = block * BLOCK
        self.zero_unused_values(segment, values_s, first_key)

        def multiply_keys(acc_ref):
            plgpu.wgmma(acc_ref, self.tile_s, keys_s.T)
            return acc_ref[...]

        s = pl.run_scoped(multiply_keys, plgpu.ACC((TILE, BLOCK), jnp.float32))
        self.copy_next_queries(segment, block == last_block)
        s = s * spec.scale
        s = lax.cond(
            first_key + BLOCK > segment.base + segment.tile.first_query + 1,
            lambda s: self.mask(s, segment, first_key),
            lambda s: s,
            s,
        )
        top = s.max(axis=1)
        m_new = jnp.maximum(m, top)
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
        if self.probabilities is not None:
            self.store_probabilities(p, m_new, top, segment, block)
        total = total * alpha + p.sum(axis=1)
        weights = p.astype(spec.dtype)
        if self.weight_s is not None:  # the interpreter multiplies shared memory only
            self.weight_s[...] = weights
            plgpu.commit_smem()
            weights = self.weight_s

        acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
        return self.add_values(acc, weights, values_s), m_new, total

    def add_values(self, acc, weights, values_s):
        """Returns the sum of values with those of one more block."""
        if not self.spec.interpret:
            return pl.run_state(lambda ref: plgpu.wgmma(ref, weights, values_s))(
                plgpu.ACC.init(acc)
            )

        def multiply(acc_ref):
            plgpu.wgmma(acc_ref, weights, values_s)
            return acc_ref[...]

        return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, acc.dtype))

    def copy_next_queries(self, segment: _Segment, is_due):
        """Starts the copy of the next segment's queries, if this CTA has one."""

        @pl.when(is_due & (self.ends[segment.index] < self.high))
        def _copy():
            self.copy_queries(self.next_segment(segment.index))

    def place_queries(self):
        """Moves the queries that have arrived to where the matrix unit reads them."""
        plgpu.barrier_wait(self.q_bar)
        queries = plgpu.load(self.q_s, layout=_ROWS, optimized=False)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.tile_s[...] = queries
        plgpu.commit_smem()

    def attend_segment(self, index, start, i, cursor: _Cursor):
        """Computes this CTA's part of a segment; returns the next i and cursor."""
        spec, segment = self.spec, self.segment(index)
        first = jnp.maximum(self.low - start, 0)
        last = jnp.minimum(self.high - start, num_blocks(segment.visible))
        self.place_queries()

        def step(block, carry):
            i, cursor, state = carry
            slot = lax.rem(i, spec.config.num_stages)
            plgpu.barrier_wait(self.kv_bar.at[slot])
            state = self.attend_block(segment, block, slot, last - 1, state)
            cursor = self.copy_block_if_mine(i + spec.config.num_stages, cursor)
            return i + 1, cursor, state

        state = (
            full((TILE, spec.head_size), 0.0, _WGMMA),
            full((TILE,), MASK_VALUE, _WGMMA_ROWS),
            full((TILE,), 0.0, _WGMMA_ROWS),
        )
        i, cursor, state = lax.fori_loop(first, last, step, (i, cursor, state))
        self.write_part(segment, *state)
        return i, cursor

    def write_part(self, segment: _Segment, acc, m, total):
        """Writes the normalised sum of values of all rows and the log of the sum."""
        tile = segment.tile
        self.log_sums[segment.index + self.cta] = m + jnp.log2(total)
        acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        self.tile_s[...] = acc.astype(self.spec.dtype)
        plgpu.commit_smem()
        part = part_row(self.spec, tile.row, tile.rows, segment.head, self.cta)

        def copy(n, _):
            row = pl.multiple_of(n * 8, 8)
            to = pl.multiple_of(part + row, 8)
            source = self.tile_s.at[pl.ds(row, 8)]
            plgpu.copy_smem_to_gmem(source, self.parts.at[pl.ds(to, 8)])

        lax.fori_loop(0, lax.div(tile.rows, 8), copy, None)

    def run(self, first_segment):
        """Computes all blocks of this CTA."""
        start = segment_start(self.ends, first_segment)
        cursor = self.cursor(first_segment, self.low - start)
        for i in range(self.spec.config.num_stages):
            cursor = self.copy_block_if_mine(jnp.int32(i), cursor)
            if i == 0:
                self.copy_queries(first_segment)

        def step(carry):
            index, start, i, cursor = carry
            i, cursor = self.attend_segment(index, start, i, cursor)
            return self.next_segment(index), self.ends[index], i, cursor

        lax.while_loop(
            lambda carry: carry[2] < self.high - self.low,
            step,
            (first_segment, start, jnp.int32(0), cursor),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def attend(spec: Spec, ends, kv_lengths, q_lengths, page_table, q, kv_pages):
    """Returns parts, log sums and, where mass is wanted, probabilities and maxima.

    The part of (segment s, CTA c) has its rows at `part_row` and its log sums at s + c.
    """
    has_mass, C = spec.mass_group is not None, spec.config.num_ctas
    D = spec.head_size
    num_rows = spec.num_rows * spec.num_heads + C * TILE
    outputs = [
        jax.ShapeDtypeStruct((num_rows, D), spec.dtype),
        jax.ShapeDtypeStruct((spec.num_segments + C, TILE), jnp.float32),
    ]
    if has_mass:
        first, last = spec.mass_segments
        lead = (last - first, spec.mass_blocks)
        stored = (*lead, spec.mass_tile_rows, spec.mass_words)
        outputs.append(jax.ShapeDtypeStruct(stored, jnp.int32))
        outputs.append(jax.ShapeDtypeStruct((*lead, TILE), jnp.float32))

    def entry(*refs):
        cta, ends = lax.axis_index("cta"), refs[0]
        total, num_ctas = shares(ends, spec)
        low = lax.div(cta * total, num_ctas)
        high = lax.div((cta + 1) * total, num_ctas)
        layout = plgpu.Layout.WG_STRIDED(ends.shape, 1)
        has_ended = plgpu.load(ends, layout=layout) <= low
        first_segment = jnp.sum(jnp.where(has_ended, 1, 0))
        inputs, outputs, scratch = refs[:6], list(refs[6:-7]), list(refs[-7:])
        outputs += [None] * (4 - len(outputs))
        names = [field.name for field in dataclasses.fields(_Attend)][4:]
        fields = dict(zip(names, (*inputs, *outputs, *scratch), strict=True))

        @pl.when((cta < num_ctas) & (ends[spec.num_segments - 1] > 0))
        def _run():
            _Attend(spec=spec, cta=cta, low=low, high=high, **fields).run(first_segment)

    return plgpu.kernel(
        entry,
        out_type=outputs,
        grid=(C,),
        grid_names=("cta",),
        kernel_name="paged_attention",
        scratch_types=_scratch(spec, has_mass),
        **spec.options,
    )(ends, kv_lengths, q_lengths, page_table, q, kv_pages)


def _scratch(spec: Spec, has_mass: bool) -> list:
    """Returns the shared memory of one CTA, in the order of the fields of `_Attend`."""
    D, config = spec.head_size, spec.config
    copies = BLOCK // min(config.copy_rows, spec.page_size, BLOCK)
    smem = functools.partial(plgpu.SMEM, transforms=_TILED)
    return [
        plgpu.SMEM((TILE, D), spec.dtype),
        smem((config.num_stages, BLOCK, 2 * D), spec.dtype),
        smem((TILE, D), spec.dtype),
        plgpu.SMEM((TILE, spec.mass_words), jnp.int32) if has_mass else None,
        smem((TILE, BLOCK), spec.dtype) if spec.interpret else None,
        plgpu.Barrier(num_arrivals=spec.tile_queries),
        plgpu.Barrier(num_arrivals=copies, num_barriers=config.num_stages),
    ]

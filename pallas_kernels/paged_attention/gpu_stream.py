"""What a CTA of the Hopper attention launch reads, and in which order.

All 64-key blocks of all segments form one stream; every CTA owns a share, one range of
it or two (`gpu_plan`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    UNITS,
    Spec,
    Tile,
    edge_query,
    num_blocks,
    visible_keys,
)
from pallas_kernels.paged_attention.gpu_plan import Share, Visit
from pallas_kernels.paged_attention.gpu_shares import next_segment


class Segment(NamedTuple):
    """One (row tile, KV head) pair."""

    index: jax.Array
    head: jax.Array
    tile: Tile
    q_len: jax.Array
    base: jax.Array  # keys that every query sees
    seen: jax.Array  # keys that every query of the tile sees
    visible: jax.Array  # keys that some query of the tile sees


class Cursor(NamedTuple):
    """The next block to copy."""

    segment: jax.Array
    unit: jax.Array  # of the stream, where the block starts
    block: jax.Array  # inside the segment
    visible: jax.Array  # keys of the segment
    lane: jax.Array
    page: jax.Array  # looked up ahead; used where a block lies in one page


@dataclasses.dataclass(frozen=True, eq=False)
class Stream:
    """The share of one CTA, where it is read from, and where it arrives."""

    spec: Spec
    share: Share
    plan: Any  # int32 [n], begins with the ends of all segments
    kv_lengths: Any  # int32 [lanes, H]
    q_lengths: Any  # int32 [lanes]
    table: Any  # int32 [lanes, W]
    queries: Any  # [T, N, D]
    pages: Any  # [P, H, page_size, 2 * D]
    q_s: Any  # [64, D]
    kv_s: Any  # [stages, 64, 2 * D]
    q_bar: Any
    kv_bar: Any

    def segment(self, index) -> Segment:
        """Returns what belongs to a segment index."""
        tile = self.spec.tile(lax.div(index, self.spec.num_heads))
        head = lax.rem(index, self.spec.num_heads)
        q_len, kv_len = self.q_lengths[tile.lane], self.kv_lengths[tile.lane, head]
        visible = visible_keys(
            kv_len, q_len, tile.first_query, tile.num_queries, tile.has_edges
        )
        # Not the query at that position: edges in front move the others back by one.
        first = self.query_at(tile.first_query, index, q_len)
        base = kv_len - q_len
        return Segment(index, head, tile, q_len, base, base + first + 1, visible)

    def query_at(self, position, segment, q_len):
        """Returns the query at a position: edges stand in front where they weigh."""
        if self.spec.edge_group is None:
            return position
        first, last = self.spec.mass_segments
        is_edge = (segment >= first) & (segment < last)
        # With 1 as the last query the order is the natural one.
        return edge_query(position, jnp.where(is_edge, q_len - 1, 1))

    def turns(self, index, unit):
        """Returns whether a unit of a segment is behind the first of two ranges."""
        if self.share.turn is None:
            return False
        return (index < self.spec.num_free[0]) & (unit >= self.share.turn)

    def next_visit(self, index) -> Visit:
        """Returns where it goes on behind a segment, or behind its share of it."""
        end = self.plan[index]
        behind = Visit(next_segment(self.plan, index, self.spec), end, jnp.int32(0))
        if self.share.turn is None:
            return behind
        is_turn, pairs = (
            self.turns(index, end),
            zip(self.share.pieces, behind, strict=True),
        )
        return Visit(*(jnp.where(is_turn, *pair) for pair in pairs))

    def cursor(self, visit: Visit) -> Cursor:
        """Returns the cursor at a block."""
        segment = self.segment(visit.segment)
        lane = segment.tile.lane
        page = self.page(lane, visit.block * BLOCK)  # does not wait for the lengths
        at = visit.segment, visit.unit, visit.block
        return Cursor(*at, segment.visible, lane, page)

    def page(self, lane, key):
        """Returns the page of a key."""
        return self.table[lane, lax.div(key, self.spec.page_size)]

    def advance(self, cursor: Cursor) -> Cursor:
        """Returns the cursor at the next block."""
        block, unit = cursor.block + 1, cursor.unit + UNITS

        def stay():
            page = self.page(cursor.lane, block * BLOCK)
            return cursor._replace(unit=unit, block=block, page=page)

        def move():
            return self.cursor(self.next_visit(cursor.segment))

        stays = block < num_blocks(cursor.visible)
        if self.share.turn is not None:
            stays &= jnp.logical_not(self.turns(cursor.segment, unit))
        return lax.cond(stays, stay, move)

    def copy_block(self, i, cursor: Cursor) -> Cursor:
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

    def copy_block_if_mine(self, i, cursor: Cursor) -> Cursor:
        """Does `copy_block` unless block i belongs to the next CTA."""
        return lax.cond(
            cursor.unit < self.share.high,
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
                oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
            )

        def skip(i, _):
            plgpu.barrier_arrive(self.q_bar)

        lax.fori_loop(0, tile.num_queries, copy, None)
        lax.fori_loop(tile.num_queries, self.spec.tile_queries, skip, None)

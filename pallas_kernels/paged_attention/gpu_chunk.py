"""How prompt chunks are cut for the Hopper launch of `gpu_prefill`, and their keys.

A tile is the work of one CTA: queries of one lane, one KV head, all their keys. One
warpgroup of the CTA, the copier, brings blocks of keys and values into shared memory.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_layouts import TILED_ROWS
from pallas_kernels.paged_attention.api import LaneGroup
from pallas_kernels.paged_attention.gpu_layout import TILE, visible_keys

_ROW_GROUP = 8  # rows of one tile of shared memory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """Tunables of one launch."""

    min_queries: int = 65  # of a lane group that this launch serves
    min_ctas: int = 64  # of such a group; the mixed launch spreads fewer, by their keys
    num_consumers: int = 2  # computing warpgroups, of 64 rows each
    block_keys: int = 128
    num_stages: int = 2  # blocks of keys in shared memory
    takes_turns: bool = True
    overlaps: bool = True
    registers: int = 232  # of a thread that computes
    copy_registers: int = 40  # of a thread that copies

    def __post_init__(self):
        if self.min_queries < 1 or self.num_stages < 2:
            raise ValueError(f"{self}: at least 1 query and 2 stages are needed")
        if self.num_consumers not in (1, 2, 3):
            raise ValueError(f"num_consumers is {self.num_consumers}; use 1, 2 or 3")
        if self.block_keys not in (64, 128, 192):
            raise ValueError(f"block_keys is {self.block_keys}; use 64, 128 or 192")
        if self.takes_turns and self.num_consumers != 2:
            raise ValueError("takes_turns needs num_consumers=2")

    def serves(self, group: LaneGroup, num_heads: int, group_size: int) -> bool:
        """Returns whether a lane group gets a launch of its own.

        With pieces that must not depend on the number of lanes: results do.
        """
        num_lanes, num_queries, piece = group
        tiles = -(-num_queries // (TILE // group_size * self.num_consumers))
        num_ctas = num_lanes * tiles * num_heads
        is_large = num_ctas >= self.min_ctas or piece is not None
        return num_queries >= self.min_queries and is_large


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class ChunkSpec:
    """Everything static about the launch for one lane group."""

    first_lane: int
    first_token: int
    num_lanes: int
    num_queries: int
    num_heads: int
    group_size: int
    head_size: int
    page_size: int
    scale: float  # of the logits, in base 2
    config: PrefillConfig
    dtype: jnp.dtype
    interpret: plgpu.InterpretGPUParams | None

    @property
    def step(self) -> int:
        """Queries of one warpgroup."""
        return TILE // self.group_size

    @property
    def tile_queries(self) -> int:
        """Queries of one CTA."""
        return self.step * self.config.num_consumers

    @property
    def tiles_per_lane(self) -> int:
        """CTAs of one lane and KV head."""
        return -(-self.num_queries // self.tile_queries)

    @property
    def copy_rows(self) -> int:
        """Keys of one copy: they lie in one page."""
        return math.gcd(self.page_size, self.config.block_keys)

    @property
    def copies(self) -> int:
        """Copies of the keys, or values, of one block."""
        return self.config.block_keys // self.copy_rows


class Tile(NamedTuple):
    """What one CTA computes."""

    lane: jax.Array
    head: jax.Array
    first_query: jax.Array
    q_len: jax.Array
    kv_len: jax.Array
    num_blocks: jax.Array  # that some row sees


def lane_order(kv_lengths: jax.Array, q_lengths: jax.Array) -> jax.Array:
    """Returns the lanes, int32 [lanes], those with the most keys first."""
    keys = jnp.where(q_lengths > 0, kv_lengths.max(axis=1), 0)
    index = jnp.arange(keys.size)
    is_tied = (keys[None] == keys[:, None]) & (index[None] < index[:, None])
    rank = jnp.sum((keys[None] > keys[:, None]) | is_tied, axis=1)
    return jnp.sum(jnp.where(rank[None] == index[:, None], index[None], 0), axis=1)


def tile_of(spec: ChunkSpec, work, order, kv_lengths, q_lengths) -> Tile:
    """Returns the tile of a CTA: those with the most keys come first."""
    head, work = lax.rem(work, spec.num_heads), lax.div(work, spec.num_heads)
    number = spec.tiles_per_lane - 1 - lax.rem(work, spec.tiles_per_lane)
    lane = spec.first_lane + order[lax.div(work, spec.tiles_per_lane)]
    q_len, kv_len = q_lengths[lane], kv_lengths[lane, head]
    first = number * spec.tile_queries
    visible = visible_keys(kv_len, q_len, first, spec.tile_queries, False)
    keys = spec.config.block_keys
    return Tile(lane, head, first, q_len, kv_len, lax.div(visible + keys - 1, keys))


@dataclasses.dataclass(frozen=True, eq=False)
class Copier:
    """The warpgroup that copies blocks of keys and values into shared memory."""

    spec: ChunkSpec
    tile: Tile
    table: Any  # int32 [lanes, W]
    pages: Any  # [P, H, page_size, 2 * D]
    k_s: Any  # [stages, keys, D]
    v_s: Any
    k_bar: Any  # [stages], a block has arrived
    v_bar: Any
    k_free: Any  # [stages], all warpgroups are done with a block
    v_free: Any
    tail_bar: Any

    def run(self):
        """Copies all blocks of the tile."""
        stages, keys = self.spec.config.num_stages, self.spec.config.block_keys

        def copy(block, _):
            slot = lax.rem(block, stages)
            pages = [self.page(block, i) for i in range(self.spec.copies)]
            is_last = (block + 1) * keys > self.tile.kv_len

            @pl.when(block >= stages)
            def _wait_for_keys():
                plgpu.barrier_wait(self.k_free.at[slot])

            self.copy_rows(block, pages, 0, self.k_s.at[slot], self.k_bar.at[slot])

            @pl.when(block >= stages)
            def _wait_for_values():
                plgpu.barrier_wait(self.v_free.at[slot])

            values, column = self.v_s.at[slot], self.spec.head_size

            @pl.when(jnp.logical_not(is_last))
            def _copy():
                self.copy_rows(block, pages, column, values, self.v_bar.at[slot])

            @pl.when(is_last)
            def _copy_last():
                self.copy_rows(block, pages, column, values, self.tail_bar)
                plgpu.barrier_wait(self.tail_bar)
                self.clear_unused(values, self.tile.kv_len - block * keys)
                for _ in range(self.spec.copies):
                    plgpu.barrier_arrive(self.v_bar.at[slot])

        def drain(block, _):
            plgpu.barrier_wait(self.k_free.at[lax.rem(block, stages)])
            plgpu.barrier_wait(self.v_free.at[lax.rem(block, stages)])

        end = self.tile.num_blocks
        lax.fori_loop(0, end, copy, None)
        lax.fori_loop(jnp.maximum(end - stages, 0), end, drain, None)

    def page(self, block, i):
        """Returns the page of the i-th copy of a block, some page past the length."""
        key = block * self.spec.config.block_keys + i * self.spec.copy_rows
        key = jnp.minimum(key, self.tile.kv_len - 1)
        return self.table[self.tile.lane, lax.div(key, self.spec.page_size)]

    def copy_rows(self, block, pages, column, target, bar):
        """Starts the copies of keys (column 0) or values of a block."""
        rows, head_size = self.spec.copy_rows, self.spec.head_size
        for i, page in enumerate(pages):
            key = block * self.spec.config.block_keys + i * rows

            @pl.when(key < self.tile.kv_len)
            def _copy(i=i, page=page, key=key):
                row = pl.multiple_of(lax.rem(key, self.spec.page_size), rows)
                columns = pl.ds(column, head_size)
                plgpu.copy_gmem_to_smem(
                    self.pages.at[page, self.tile.head, pl.ds(row, rows), columns],
                    target.at[pl.ds(i * rows, rows)],
                    bar,
                )

            @pl.when(key >= self.tile.kv_len)
            def _skip():
                plgpu.barrier_arrive(bar)

    def clear_unused(self, values, num_used):
        """Clears value rows past the length: 0 * NaN would be NaN."""

        def clear(i, _):
            first = pl.multiple_of(i * _ROW_GROUP, _ROW_GROUP)
            rows = values.at[pl.ds(first, _ROW_GROUP)]
            x = plgpu.load(rows, layout=TILED_ROWS, optimized=False)
            row = plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=TILED_ROWS)
            rows[...] = jnp.where(row + first < num_used, x, jnp.zeros_like(x))

        end = self.spec.config.block_keys // _ROW_GROUP
        lax.fori_loop(lax.div(num_used, _ROW_GROUP), end, clear, None)
        plgpu.commit_smem()

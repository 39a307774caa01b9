"""Scoring by an index and selection for Hopper GPUs, in Pallas Mosaic GPU.

One CTA per (lane, KV head), in five phases:

1. each thread weighs a channel, and ranks it among all; 16 are kept, with the queries'
   values there and the logits that keys in the middle of their ranges would have;
2. codes are read, widened and multiplied (`gpu_scores`), for the sums of the softmax of
   each query head;
3. the same again for the scores. That is cheaper than keeping logits: codes come from
   the L2 cache. Of a score its rank is kept in shared memory, and ranks are counted;
4. the counts say which rank is the last to be chosen, and how many are above;
5. positions are written in ascending order, of the last rank the lowest ones.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.array_types import KeyCodes, PageTable, PerLane, Queries
from pallas_kernels.gpu_counting import (
    THREADS,
    append_chosen,
    synchronize,
    warp_scan,
)
from pallas_kernels.gpu_layouts import interpreter_of, row_layout
from pallas_kernels.score_select import gpu_ranks
from pallas_kernels.score_select.codes import CodeLayout
from pallas_kernels.score_select.gpu_scores import CHANNELS, TileSpec, score_tile
from pallas_kernels.score_select.reference import (
    NUM_RANKS,
)
from pallas_kernels.select_tokens.api import SelectedTokens

_LOG2E = math.log2(math.e)
_LARGEST_POWER = 100.0  # of 2, that a term of a softmax may have
_WARPS = 4  # of a warpgroup
_RANKS_OF_THREAD = NUM_RANKS // THREADS
_AT_ONCE = 8  # neighbouring positions of a thread that writes them
_SHARED_BYTES = 200 << 10

# Of an array with one row per thread, and of one value per thread.
_ROWS = plgpu.Layout.TILED(
    plgpu.Tiling(((THREADS, 4), (32, 4))),
    warp_dims=(-4,),
    lane_dims=(-2,),
    vector_dim=-1,
)
_BY_THREAD = _ROWS.reduce(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Tunables of one launch."""

    num_warpgroups: int = 1
    at_once: int = 2  # tiles of a warpgroup whose loads are under way together

    def __post_init__(self):
        if self.num_warpgroups not in (1, 2, 4) or self.at_once < 1:
            raise ValueError(f"{self}: use 1, 2 or 4 warpgroups, and a tile at least")

    @property
    def slab(self) -> int:
        """Positions that a CTA writes at once."""
        return self.num_warpgroups * THREADS * _AT_ONCE


# Compiled once for all layers of a model.
@functools.partial(
    jax.jit,
    static_argnames=("layout", "cap", "num_recent", "scale", "interpret", "config"),
)
def score_select_gpu(
    q: Queries,
    codes: KeyCodes,
    page_table: PageTable,
    lengths: PerLane,
    budgets: PerLane,
    *,
    layout: CodeLayout,
    cap: int,
    num_recent: int,
    scale: float,
    interpret: bool | plgpu.InterpretGPUParams = False,
    config: ScoreConfig | None = None,
) -> SelectedTokens:
    """Returns what `api.score_select` documents, computed on a Hopper GPU."""
    config = config or ScoreConfig()
    num_heads = codes.shape[1]
    group_size = q.shape[1] // num_heads
    num_keys = page_table.shape[1] * layout.page_size
    check_supported(q.dtype, group_size, layout, num_keys, config)
    select = _Select(
        tile=TileSpec(layout, group_size),
        config=config,
        cap=cap,
        num_recent=num_recent,
        scale=scale * _LOG2E,
        num_rows=-(-num_keys // config.slab) * config.slab // _AT_ONCE,
        interpret=interpret,
    )
    lanes = page_table.shape[0]
    made = plgpu.kernel(
        select.body,
        out_type=(
            jax.ShapeDtypeStruct((lanes, num_heads, cap), jnp.int32),
            jax.ShapeDtypeStruct((lanes, num_heads), jnp.int32),
        ),
        grid=(lanes, num_heads),
        grid_names=("lane", "head"),
        num_threads=config.num_warpgroups,
        thread_name="wg",
        kernel_name="score_select",
        scratch_types=select.scratch(),
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpreter_of(interpret),
    )(q, codes, page_table, lengths, budgets)
    return SelectedTokens(*made)


def check_supported(
    dtype,
    group_size: int,
    layout: CodeLayout,
    num_keys: int,
    config: ScoreConfig | None = None,
) -> None:
    """NotImplementedError, naming the value, if the kernel cannot serve these."""
    config = config or ScoreConfig()
    if jnp.dtype(dtype) != jnp.bfloat16:
        raise NotImplementedError(
            f"q is {jnp.dtype(dtype).name}: the GPU kernel multiplies bfloat16; "
            "impl='reference' serves both"
        )
    if layout.head_size not in (64, 128):
        raise NotImplementedError(
            f"the head size is {layout.head_size}: the GPU kernel serves 64 and 128; "
            "impl='reference' serves every size"
        )
    if group_size > 8:
        raise NotImplementedError(
            f"{group_size} query heads per KV head: the GPU kernel serves up to 8"
        )
    if layout.bits not in (2, 4) or layout.fields < 8:
        raise NotImplementedError(
            f"codes have {layout.bits} bits in groups of {layout.group} keys: the GPU "
            "kernel serves 2 and 4 bits, and pages of a multiple of 8 keys"
        )
    if _shared_bytes(num_keys, config) > _SHARED_BYTES:
        most = (_SHARED_BYTES - _shared_bytes(0, config)) // 2
        raise NotImplementedError(
            f"a table has room for {num_keys} keys: the GPU kernel selects among at "
            f"most {most // config.slab * config.slab}; impl='reference' serves every "
            "number"
        )


def _shared_bytes(num_keys: int, config: ScoreConfig) -> int:
    """Returns bytes of the ranks, of the counts and of all else, at most."""
    slabs = -(-num_keys // config.slab)
    counts = config.num_warpgroups * 4 * NUM_RANKS
    return 2 * slabs * config.slab + counts + config.num_warpgroups * 3072


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Select:
    """One launch."""

    tile: TileSpec
    config: ScoreConfig
    cap: int
    num_recent: int
    scale: float  # of logits, for powers of 2
    num_rows: int  # of 8 ranks in shared memory
    interpret: bool | plgpu.InterpretGPUParams

    def scratch(self) -> dict:
        """Returns shared memory; what a warpgroup has to itself has its index."""
        num, columns = self.config.num_warpgroups, self.tile.columns
        return dict(
            weights=plgpu.SMEM((num, self.tile.codes.head_size), jnp.float32),
            channels=plgpu.SMEM((num, CHANNELS), jnp.int32),
            queries=plgpu.SMEM((num, 8, CHANNELS), jnp.bfloat16),
            middles=plgpu.SMEM((num, CHANNELS, columns), jnp.float32),
            sums=plgpu.SMEM((num, _WARPS, columns), jnp.float32),
            ranks=plgpu.SMEM((self.num_rows, _AT_ONCE), jnp.int16),
            counts=plgpu.SMEM((num, THREADS, _RANKS_OF_THREAD), jnp.int32),
            scan=plgpu.SMEM((num, THREADS), jnp.int32),
            found=plgpu.SMEM((num, 2), jnp.int32),
            bar=plgpu.Barrier(num_arrivals=num),
        )

    def body(self, q, codes, table, length_ref, budget_ref, out, count_ref, **scratch):
        """Selects for one lane and KV head."""
        lane, head = lax.axis_index("lane"), lax.axis_index("head")
        length = length_ref[lane]
        wanted = jnp.minimum(jnp.minimum(budget_ref[lane], length), self.cap)
        cta = _Cta(self, lane, head, lax.axis_index("wg"), length, wanted, scratch)

        @pl.when(cta.wg == 0)
        def _write_count():
            count_ref[lane, head] = wanted

        cta.clear()
        cta.keep_channels(q, codes, table)
        cta.synchronize()
        middle = cta.middle()
        refs = codes, table, cta.mine("channels"), cta.mine("queries")
        inverse = cta.inverse_sums(refs, middle)
        cta.rank(refs, middle, inverse)
        cta.synchronize()
        threshold, num_larger = cta.find_threshold()
        cta.write(out.at[lane, head], threshold, num_larger)


@dataclasses.dataclass(frozen=True, eq=False)
class _Cta:
    """A lane and KV head, and the warpgroup that runs this."""

    select: _Select
    lane: jax.Array
    head: jax.Array
    wg: jax.Array
    length: jax.Array
    wanted: jax.Array
    scratch: dict

    def mine(self, name):
        """Returns the part of a scratch that this warpgroup has to itself."""
        return self.scratch[name].at[self.wg]

    def synchronize(self):
        """Waits for all warpgroups."""
        synchronize(self.scratch["bar"], self.select.interpret)

    def clear(self):
        """Clears the counts; of nothing wanted no rank is the last one."""
        shape = THREADS, _RANKS_OF_THREAD
        zeros = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), _ROWS)
        self.mine("counts")[...] = zeros
        self.scratch["found"][self.wg, 0] = jnp.int32(NUM_RANKS)
        self.scratch["found"][self.wg, 1] = jnp.int32(0)

    def keep_channels(self, q, codes, table):
        """Phase 1: every thread has a channel."""
        layout = self.select.tile.codes
        by_channel = row_layout(layout.head_size).reduce(0)
        step, middle = gpu_ranks.sampled_ranges(
            layout,
            (codes, table),
            (self.lane, self.head, self.length),
            (by_channel, _BY_THREAD),
            self.select.interpret,
        )
        group_size = self.select.tile.group_size
        queries = [
            plgpu.load(
                q.at[self.lane, self.head * group_size + i],
                layout=by_channel,
                optimized=False,
            ).astype(jnp.float32)
            for i in range(group_size)
        ]
        weight = step * functools.reduce(jnp.add, [jnp.abs(x) for x in queries])
        self.mine("weights")[...] = weight
        self.synchronize()
        names = "weights", "channels", "queries", "middles"
        gpu_ranks.keep_channels(
            [self.mine(name) for name in names],
            weight,
            queries,
            [x * middle for x in queries],
            by_channel,
            self.select.tile.columns,
            self.select.interpret,
        )

    def middle(self):
        """Returns scaled logits of keys in the middle of their ranges, [columns]."""
        total = plgpu.layout_cast(
            jnp.zeros((self.select.tile.columns,), jnp.float32), self._by_column
        )
        for i in range(CHANNELS):
            total += plgpu.load(
                self.mine("middles").at[i], layout=self._by_column, optimized=False
            )
        return total * self.select.scale

    @property
    def _by_column(self):
        return self.select.tile.layout.reduce(0)

    def _tiles(self, refs, middle, use, carry):
        """Calls `use(carry, terms, tile)` for every tile of this warpgroup.

        Terms are those of the softmax, float32 [keys, columns], 0 past the length.
        """
        tile_spec, config = self.select.tile, self.select.config
        keys, num = tile_spec.keys, config.num_warpgroups
        num_tiles = lax.div(self.length + (keys - 1), keys)
        each = num * config.at_once

        def some(i, carry):
            tiles = [i * each + n * num + self.wg for n in range(config.at_once)]
            logits = [
                score_tile(
                    tile_spec,
                    refs,
                    (self.lane, self.head, tile, self.length),
                    _BY_THREAD,
                    self.select.interpret,
                )
                for tile in tiles
            ]
            for tile, values in zip(tiles, logits, strict=True):
                shape = values.shape
                power = values * self.select.scale
                power -= lax.broadcast_in_dim(middle, shape, [1])
                carry = use(carry, jnp.exp2(jnp.minimum(power, _LARGEST_POWER)), tile)
            return carry

        return lax.fori_loop(0, lax.div(num_tiles + (each - 1), each), some, carry)

    def inverse_sums(self, refs, middle):
        """Phase 2: 1 / (heads times the sum of a head's terms), [columns]."""
        tile = self.select.tile
        zeros = jnp.zeros((tile.keys, tile.columns), jnp.float32)
        sums = self._tiles(
            refs,
            middle,
            lambda sums, terms, _: sums + terms,
            plgpu.layout_cast(zeros, tile.layout),
        )
        gpu_ranks.write_column_sums(
            self.mine("sums"), sums, tile.layout, self.select.interpret
        )
        self.synchronize()
        total = plgpu.layout_cast(
            jnp.zeros((tile.columns,), jnp.float32), self._by_column
        )
        for wg in range(self.select.config.num_warpgroups):
            for warp in range(_WARPS):
                total += plgpu.load(
                    self.scratch["sums"].at[wg, warp],
                    layout=self._by_column,
                    optimized=False,
                )
        column = plgpu.broadcasted_iota(
            jnp.int32, (tile.columns,), 0, layout=self._by_column
        )
        # A head all of whose terms vanish has no say.
        is_head = (column < tile.group_size) & (total > 0)
        return jnp.where(is_head, 1.0 / (total * tile.group_size), 0.0)

    def rank(self, refs, middle, inverse):
        """Phase 3: ranks of all keys in shared memory, and their counts."""
        tile_spec = self.select.tile
        recent = self.length - jnp.minimum(self.select.num_recent, self.wanted)

        def note(carry, terms, tile):
            gpu_ranks.note_ranks(
                tile_spec,
                (self.scratch["ranks"], self.mine("counts")),
                terms,
                inverse,
                (tile, recent, self.length),
                (tile_spec.layout, self._by_column, _BY_THREAD),
                self.select.interpret,
            )
            return carry

        self._tiles(refs, middle, note, jnp.int32(0))

    def find_threshold(self):
        """Phase 4: the last rank to be chosen, and how many keys are above it."""
        shape = THREADS, _RANKS_OF_THREAD
        counts = plgpu.layout_cast(jnp.zeros(shape, jnp.int32), _ROWS)
        for wg in range(self.select.config.num_warpgroups):
            counts += plgpu.load(
                self.scratch["counts"].at[wg], layout=_ROWS, optimized=False
            )
        scan = warp_scan(counts.sum(axis=1), _BY_THREAD, self.select.interpret)
        self.mine("scan")[...] = scan
        self.synchronize()
        thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=_BY_THREAD)
        for warp in range(_WARPS):
            total = self.scratch["scan"][self.wg, 32 * warp + 31]
            scan += total * jnp.where(thread >= 32 * (warp + 1), 1, 0)
        wanted = plgpu.layout_cast(jnp.full((THREADS,), self.wanted), _BY_THREAD)
        gpu_ranks.find_rank(
            self.mine("found"),
            counts,
            self.length - scan,
            wanted,
            (_ROWS, _BY_THREAD),
            self.select.interpret,
        )
        self.synchronize()
        found = self.scratch["found"]
        return found[self.wg, 0], found[self.wg, 1]

    def write(self, out, threshold, num_larger):
        """Phase 5: positions in ascending order."""
        config = self.select.config
        thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=_BY_THREAD)

        def write_slab(slab, carry):
            larger, equal = carry  # positions before
            row = (slab * config.num_warpgroups + self.wg) * THREADS
            row = pl.multiple_of(row, THREADS)
            ranks = plgpu.load(
                self.scratch["ranks"].at[pl.ds(row, THREADS)],
                layout=_ROWS,
                optimized=False,
            ).astype(jnp.int32)
            shape = ranks.shape
            place = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=_ROWS)
            place = (row + place) * _AT_ONCE
            place += plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_ROWS)
            ranks = jnp.where(place < self.length, ranks, -1)
            kind = jnp.where(ranks > threshold, 1 << 16, 0)
            kind += jnp.where(ranks == threshold, 1, 0)
            both = kind.sum(axis=1)  # two counts in one word
            scan, total = self._before_thread(both)
            larger_before = larger + lax.shift_right_logical(scan, 16)
            equal_before = equal + (scan & 0xFFFF)
            append_chosen(
                out,
                larger_before,
                equal_before,
                (row + thread) * _AT_ONCE,
                kind,
                self.wanted - num_larger,
                _ROWS,
                _BY_THREAD,
                self.select.interpret,
            )
            return larger + lax.shift_right_logical(total, 16), equal + (total & 0xFFFF)

        num_slabs = lax.div(self.length + (config.slab - 1), config.slab)
        zero = jnp.int32(0)
        lax.fori_loop(0, num_slabs, write_slab, (zero, zero))

    def _before_thread(self, value):
        """Returns sums over earlier threads of the CTA, and over all of them."""
        self.synchronize()  # the sums before have been read
        scan = warp_scan(value, _BY_THREAD, self.select.interpret)
        self.mine("scan")[...] = scan
        self.synchronize()
        thread = plgpu.broadcasted_iota(jnp.int32, (THREADS,), 0, layout=_BY_THREAD)
        total, scan = jnp.int32(0), scan - value
        for wg in range(self.select.config.num_warpgroups):
            for warp in range(_WARPS):
                warp_total = self.scratch["scan"][wg, 32 * warp + 31]
                total += warp_total
                is_later = jnp.where(thread >= 32 * (warp + 1), 1, 0)
                is_same = jnp.where(self.wg == wg, 1, 0)
                is_before = is_later * is_same + jnp.where(self.wg > wg, 1, 0)
                scan += warp_total * is_before
        return scan, total

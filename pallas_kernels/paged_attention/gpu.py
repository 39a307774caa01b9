"""Paged attention for Hopper GPUs, in Pallas Mosaic GPU.

One persistent launch walks all 64-key blocks of all (row tile, KV head) segments,
divided evenly over the CTAs; a second launch merges the parts of the segments that
were cut, and normalises the mass. docs/kernels.md draws the layout.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.paged_attention.api import AttentionOutput, LaneGroup

BLOCK = 64  # keys of one step
TILE = 64  # query rows of one matrix instruction
_LOG2E = math.log2(math.e)
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
# Probabilities are kept relative to 2**-14 of the running maximum: float16 then
# holds 11 bits of everything down to 4e-9 of the maximum.
_HEADROOM = 14.0
_MASS_BLOCKS = 16  # key blocks of one CTA of the mass kernel
_MASS_ROWS = 4  # rows loaded at once there


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Tunables of one launch."""

    num_ctas: int = 264  # persistent CTAs, two per multiprocessor of an H100
    num_stages: int = 2  # key blocks in flight per CTA
    copy_rows: int = 32  # rows of one asynchronous copy, a divisor of 64
    share_buffer: bool = False  # stage results where the queries were: room for stages


class _Tiles(NamedTuple):
    """Static layout, one entry per row tile: a lane's queries cut to whole tiles."""

    lane: np.ndarray
    first_query: np.ndarray
    num_queries: np.ndarray
    row: np.ndarray  # first row in the packed queries
    rows: np.ndarray  # packed rows, a multiple of 8
    group_first: tuple[int, ...]  # first tile of every group, and of none
    queries_per_tile: tuple[int, ...]
    row_tiles: int  # 64-row tiles per entry
    num_rows: int

    def has_edges(self, edge_group: int | None) -> np.ndarray:
        """Which tiles start with the first and the last valid query of a lane."""
        tile = np.arange(len(self.lane))
        if edge_group is None:
            return tile < 0
        first, last = self.group_first[edge_group : edge_group + 2]
        return (tile >= first) & (tile < last) & (self.first_query == 0)


@functools.cache
def _tiles(groups: tuple[LaneGroup, ...], group_size: int) -> _Tiles:
    row_tiles = 1 if max(g.num_queries for g in groups) * group_size <= TILE else 2
    fields, group_first, per_tile = [], [0], []
    lane, row = 0, 0
    for num_lanes, num_queries in groups:
        step = min(num_queries, row_tiles * TILE // group_size)
        rows = _round_up(step * group_size, 8)
        per_tile.append(step)
        for i in range(num_lanes):
            for first in range(0, num_queries, step):
                count = min(step, num_queries - first)
                fields.append((lane + i, first, count, row, rows))
                row += rows
        lane += num_lanes
        group_first.append(len(fields))
    columns = np.asarray(fields, np.int32).T
    return _Tiles(*columns, tuple(group_first), tuple(per_tile), row_tiles, row)


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def _edge_query(position, last):
    """Returns the query at a row position: first, last valid, then the others."""
    other = jnp.where(position - 1 < last, position - 1, position)
    return jnp.where(position == 0, 0, jnp.where(position == 1, last, other))


def _edge_position(query, last):
    """Returns the row position of a query: the inverse of `_edge_query`."""
    other = jnp.where(query < last, query + 1, query)
    return jnp.where(query == 0, 0, jnp.where(query == last, 1, other))


def _pack(q, q_lengths, spec):
    """Returns the rows of every tile behind each other, [H, num_rows + pad, D]."""
    tiles, H, G, D = spec.tiles, spec.num_heads, spec.group_size, spec.head_size
    packed, token, lane = [], 0, 0
    for index, (num_lanes, num_queries) in enumerate(spec.groups):
        count = num_lanes * num_queries
        x = q[token : token + count].reshape(num_lanes, num_queries, -1)
        if index == spec.edge_group:
            last = q_lengths[lane : lane + num_lanes, None] - 1
            order = _edge_query(jnp.arange(num_queries)[None, :], last)
            order = jnp.clip(order, 0, num_queries - 1)
            x = jnp.take_along_axis(x, order[:, :, None], axis=1)
        step = tiles.queries_per_tile[index]
        pad = _round_up(num_queries, step) - num_queries
        x = jnp.pad(x, ((0, 0), (0, pad), (0, 0)))
        x = x.reshape(-1, step, H, G, D).transpose(2, 0, 1, 3, 4)
        x = x.reshape(H, -1, step * G, D)
        pad = _round_up(step * G, 8) - step * G
        x = jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))
        packed.append(x.reshape(H, -1, D))
        token, lane = token + count, lane + num_lanes
    packed.append(jnp.zeros((H, tiles.row_tiles * TILE, D), q.dtype))
    return jnp.concatenate(packed, axis=1)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Spec:
    """Everything static about one call."""

    groups: tuple[LaneGroup, ...]
    tiles: _Tiles
    num_heads: int
    group_size: int
    head_size: int
    page_size: int
    scale: float  # of the logits, in base 2
    mass_group: int | None
    mass_rows: str
    config: AttentionConfig
    dtype: jnp.dtype
    interpret: bool

    @property
    def num_segments(self) -> int:
        return len(self.tiles.lane) * self.num_heads

    @property
    def edge_group(self) -> int | None:
        """The group whose rows start with its first and last valid query."""
        return self.mass_group if self.mass_rows == "edges" else None

    @property
    def part_rows(self) -> int:
        per_cta = self.tiles.row_tiles * TILE
        return self.tiles.num_rows * self.num_heads + self.config.num_ctas * per_cta

    @property
    def mass_segments(self) -> tuple[int, int]:
        """The segments that store probabilities."""
        if self.mass_group is None:
            return 0, 0
        first = self.tiles.group_first[self.mass_group]
        last = self.tiles.group_first[self.mass_group + 1]
        return first * self.num_heads, last * self.num_heads

    @property
    def mass_tile_rows(self) -> int:
        """Rows of probabilities stored per segment and block, a multiple of 8."""
        if self.mass_group is None:
            return 0
        per_tile = self.tiles.queries_per_tile[self.mass_group]
        if self.mass_rows == "edges":
            per_tile = min(2, per_tile)
        return _round_up(per_tile * self.group_size, 8)

    @property
    def options(self) -> dict:
        return dict(
            compiler_params=plgpu.CompilerParams(
                approx_math=True, reduction_scratch_bytes=512
            ),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )


def _ends(kv_lengths, q_lengths, spec):
    """Returns where the blocks of every segment end in the stream of all blocks.

    int32 [S padded to 128]; the padding repeats the total. One fused reduction, the
    same for all layers of a model, so a compiled step computes it once.
    """
    tiles = spec.tiles
    visible = _visible_keys(
        kv_lengths[tiles.lane],
        q_lengths[tiles.lane][:, None],
        tiles.first_query[:, None],
        tiles.num_queries[:, None],
        tiles.has_edges(spec.edge_group)[:, None],
    )
    blocks = _blocks(visible.reshape(1, -1))
    index = np.arange(_round_up(spec.num_segments, 128))[:, None]
    before = np.arange(spec.num_segments)[None, :] <= index
    return jnp.sum(jnp.where(before, blocks, 0), axis=1)


def _visible_keys(kv_len, q_len, first_query, num_queries, has_edges):
    """Returns how many keys the rows of a tile see at most."""
    last = jnp.minimum(first_query + num_queries, q_len)
    last = jnp.where(has_edges, q_len, last)
    return jnp.maximum(jnp.where(first_query < q_len, kv_len - q_len + last, 0), 0)


def paged_attention_gpu(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    kv_lengths: jax.Array,
    q_lengths: jax.Array,
    *,
    groups: tuple[LaneGroup, ...],
    scale: float | None = None,
    mass_group: int | None = None,
    mass_rows: str = "all",
    interpret: bool = False,
    config: AttentionConfig | None = None,
) -> AttentionOutput:
    """Returns what `api.paged_attention` documents, computed on a Hopper GPU."""
    num_heads, page_size = kv_pages.shape[1:3]
    head_size = kv_pages.shape[3] // 2
    group_size = q.shape[1] // num_heads
    groups = tuple(LaneGroup(*group) for group in groups)
    spec = _Spec(
        groups=groups,
        tiles=_tiles(groups, group_size),
        num_heads=num_heads,
        group_size=group_size,
        head_size=head_size,
        page_size=page_size,
        scale=(head_size**-0.5 if scale is None else scale) * _LOG2E,
        mass_group=mass_group,
        mass_rows=mass_rows,
        config=config or AttentionConfig(),
        dtype=jnp.dtype(q.dtype),
        interpret=interpret,
    )
    ends = _ends(kv_lengths, q_lengths, spec)
    lengths = (ends, kv_lengths, q_lengths)
    packed = _pack(q, q_lengths, spec)
    stored = _attend(spec, *lengths, page_table, packed, kv_pages)
    out, *mass = _finish(spec, *lengths, *stored)
    if not mass:
        return AttentionOutput(out, None)
    num_keys = page_table.shape[1] * page_size
    mass = mass[0].reshape(*mass[0].shape[:2], -1)
    return AttentionOutput(out, mass[..., :num_keys])


class _Cursor(NamedTuple):
    """The next block to copy."""

    segment: jax.Array
    block: jax.Array  # inside the segment
    visible: jax.Array  # keys of the segment
    lane: jax.Array
    page: jax.Array  # looked up ahead where a block lies in one page


def _blocks(visible):
    return lax.shift_right_logical(visible + (BLOCK - 1), 6)


def _start(ends_ref, segment):
    before = ends_ref[jnp.maximum(segment - 1, 0)]
    return jnp.where(segment == 0, 0, before)


def _count_ended(ends_ref, block):
    """Returns the number of segments that end at or before `block`."""
    layout = plgpu.Layout.WG_STRIDED(ends_ref.shape, 1)
    ends = plgpu.load(ends_ref, layout=layout)
    return jnp.sum(jnp.where(ends <= block, 1, 0))


def _attend(spec, ends, kv_lengths, q_lengths, page_table, packed, kv_pages):
    """Returns the parts [rows, D], their base-2 log sums, and what the mass needs.

    Part (segment s, CTA c) has the rows from row(s) + c * row_tiles * 64 on and the
    log sums [s + c]: along the stream of blocks one of the two indices grows.
    """
    cfg, tiles = spec.config, spec.tiles
    D, H, G, MT = spec.head_size, spec.num_heads, spec.group_size, tiles.row_tiles
    ps, stages, num_segments = spec.page_size, cfg.num_stages, spec.num_segments
    copy_rows = min(cfg.copy_rows, ps, BLOCK)
    copies = BLOCK // copy_rows
    mass_first, mass_last = spec.mass_segments
    has_mass = spec.mass_group is not None
    mass_rows = spec.mass_tile_rows
    static = np.stack(
        [
            tiles.lane,
            tiles.first_query,
            tiles.num_queries,
            tiles.row,
            tiles.rows,
            tiles.has_edges(spec.edge_group).astype(np.int32),
        ],
        axis=1,
    )
    wgmma_rows = plgpu.Layout.WGMMA.reduce(1)

    def entry(*refs):
        # Sums before the buffers exist: its scratch then shares their memory.
        cta, ends_ref = lax.axis_index("cta"), refs[1]
        total = ends_ref[num_segments - 1]
        lo = cta * total // cfg.num_ctas
        hi = (cta + 1) * total // cfg.num_ctas
        first_segment = _count_ended(ends_ref, lo)
        pl.run_scoped(
            functools.partial(body, cta, lo, hi, first_segment, *refs), *scratch
        )

    def body(cta, lo, hi, s0, static_ref, ends_ref, kv_len_ref, q_len_ref, table_ref,
             q_ref, kv_ref, part_ref, lse_ref, *rest):  # fmt: skip
        if has_mass:
            prob_ref, max_ref, *rest = rest
        q_s, kv_s, o_s, mass_s, weight_s, q_bar, kv_bar = rest
        o_s = q_s if cfg.share_buffer else o_s

        def next_nonempty(segment):
            end = ends_ref[segment]
            return lax.while_loop(
                lambda s: (s < num_segments - 1) & (ends_ref[s] <= end),
                lambda s: s + 1,
                jnp.minimum(segment + 1, num_segments - 1),
            )

        def fields(segment):
            """Returns lane, head, q_len, kv_len and visible keys of a segment."""
            tile, head = lax.div(segment, H), lax.rem(segment, H)
            lane = static_ref[tile, 0]
            q_len, kv_len = q_len_ref[lane], kv_len_ref[lane, head]
            visible = _visible_keys(
                kv_len,
                q_len,
                static_ref[tile, 1],
                static_ref[tile, 2],
                static_ref[tile, 5] == 1,
            )
            return lane, head, q_len, kv_len, visible

        def look_up(segment, block):
            lane, _, _, _, visible = fields(segment)
            column = jnp.minimum(block * BLOCK, jnp.maximum(visible - 1, 0)) // ps
            return _Cursor(segment, block, visible, lane, table_ref[lane, column])

        def advance(cursor):
            is_last = cursor.block + 1 >= _blocks(cursor.visible)

            def next_segment():
                return next_nonempty(cursor.segment), jnp.int32(0)

            return look_up(
                *lax.cond(
                    is_last, next_segment, lambda: (cursor.segment, cursor.block + 1)
                )
            )

        def issue(i, cursor):
            """Starts the copies of local block i; returns the cursor behind it."""
            slot = lax.rem(i, stages)
            head = lax.rem(cursor.segment, H)
            for c in range(copies):
                key = cursor.block * BLOCK + c * copy_rows

                @pl.when(key < cursor.visible)
                def _copy(c=c, key=key):
                    if ps >= BLOCK:
                        page = cursor.page
                    else:
                        page = table_ref[cursor.lane, key // ps]
                    row = pl.multiple_of(lax.rem(key, ps), copy_rows)
                    plgpu.copy_gmem_to_smem(
                        kv_ref.at[page, head, pl.ds(row, copy_rows)],
                        kv_s.at[slot, pl.ds(c * copy_rows, copy_rows)],
                        kv_bar.at[slot],
                    )

                @pl.when(key >= cursor.visible)
                def _skip():
                    plgpu.barrier_arrive(kv_bar.at[slot])

            return advance(cursor)

        def issue_if(i, cursor):
            return lax.cond(lo + i < hi, lambda c: issue(i, c), lambda c: c, cursor)

        def copy_q(segment):
            row = pl.multiple_of(static_ref[lax.div(segment, H), 3], 8)
            head = lax.rem(segment, H)
            plgpu.copy_gmem_to_smem(q_ref.at[head, pl.ds(row, MT * TILE)], q_s, q_bar)

        def attend_segment(segment, start, i0, cursor):
            tile = lax.div(segment, H)
            lane, head, q_len, kv_len, visible = fields(segment)
            base = kv_len - q_len
            q0, row0, rows = (static_ref[tile, n] for n in (1, 3, 4))
            row0 = pl.multiple_of(row0, 8)
            first = jnp.maximum(lo - start, 0)
            last = jnp.minimum(hi - start, _blocks(visible))
            plgpu.barrier_wait(q_bar)

            def masked(logits, mt, key0):
                shape, layout = (TILE, BLOCK), plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                query = q0 + (row + mt * TILE) // G
                if spec.edge_group is not None:
                    # With 1 as the last query the order is the natural one.
                    is_edge = (segment >= mass_first) & (segment < mass_last)
                    query = _edge_query(query, jnp.where(is_edge, q_len - 1, 1))
                limit = jnp.minimum(base + query + 1, visible)
                return jnp.where(key + key0 < limit, logits, MASK_VALUE)

            def store_probabilities(p, m, mt, block):
                count = min(mass_rows - mt * TILE, TILE)

                @pl.when(
                    (segment >= mass_first)
                    & (segment < mass_last)
                    & (block * BLOCK < base)
                )
                def _store():
                    index = segment - mass_first
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    mass_s[...] = p.astype(jnp.float16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        mass_s.at[pl.ds(0, count)],
                        prob_ref.at[index, block, pl.ds(mt * TILE, count)],
                    )
                    max_ref[index, block, pl.ds(mt * TILE, TILE)] = m

            def attend_block(block, carry):
                i, cursor, state = carry
                slot = lax.rem(i, stages)
                k_s = kv_s.at[slot, :, pl.ds(0, D)]
                v_s = kv_s.at[slot, :, pl.ds(D, D)]
                key0 = block * BLOCK
                plgpu.barrier_wait(kv_bar.at[slot])

                @pl.when(key0 + BLOCK > visible)
                def _zero_unused_values():  # 0 * NaN would be NaN
                    layout = plgpu.Layout.WGMMA
                    v = plgpu.load(v_s, layout=layout, optimized=False)
                    row = plgpu.broadcasted_iota(
                        jnp.int32, (BLOCK, D), 0, layout=layout
                    )
                    v_s[...] = jnp.where(row < visible - key0, v, jnp.zeros_like(v))
                    plgpu.commit_smem()

                def attend_tile(mt, state):
                    acc, m, l = state

                    def logits(acc_ref):
                        plgpu.wgmma(acc_ref, q_s.at[pl.ds(mt * TILE, TILE)], k_s.T)
                        return acc_ref[...]

                    s = pl.run_scoped(logits, plgpu.ACC((TILE, BLOCK), jnp.float32))
                    s = s * spec.scale
                    s = lax.cond(
                        key0 + BLOCK > base + q0 + 1,
                        lambda s: masked(s, mt, key0),
                        lambda s: s,
                        s,
                    )
                    m_new = jnp.maximum(m, s.max(axis=1) - _HEADROOM)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
                    if has_mass and mt * TILE < mass_rows:
                        store_probabilities(p, m_new, mt, block)
                    l = l * alpha + p.sum(axis=1)
                    p = p.astype(spec.dtype)
                    if spec.interpret:  # whose wgmma reads shared memory only
                        weight_s[...] = p
                        plgpu.commit_smem()
                        p = weight_s

                    def values(acc_ref):
                        plgpu.wgmma(acc_ref, p, v_s)
                        return acc_ref[...]

                    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
                    acc += pl.run_scoped(values, plgpu.ACC((TILE, D), jnp.float32))
                    return acc, m_new, l

                state = tuple(
                    attend_tile(0, state[0])
                    if mt == 0
                    else lax.cond(
                        rows > mt * TILE,
                        functools.partial(attend_tile, mt),
                        lambda x: x,
                        state[mt],
                    )
                    for mt in range(MT)
                )
                return i + 1, issue_if(i + stages, cursor), state

            def zeros(shape, layout, value=0.0):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            state = tuple(
                (
                    zeros((TILE, D), plgpu.Layout.WGMMA),
                    zeros((TILE,), wgmma_rows, MASK_VALUE),
                    zeros((TILE,), wgmma_rows),
                )
                for _ in range(MT)
            )
            i, cursor, state = lax.fori_loop(
                first, last, attend_block, (i0, cursor, state)
            )
            end = start + _blocks(visible)

            def copy_next_q():
                @pl.when(end < hi)
                def _copy():
                    copy_q(next_nonempty(segment))

            if not cfg.share_buffer:
                copy_next_q()
            part = row0 * H + head * rows + cta * (MT * TILE)
            for mt in range(MT):

                @pl.when(rows > mt * TILE)
                def _write(state=state[mt], mt=mt):
                    acc, m, l = state
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    lse_ref[segment + cta, pl.ds(mt * TILE, TILE)] = m + jnp.log2(l)
                    acc = acc * lax.broadcast_in_dim(1.0 / l, acc.shape, [0])
                    o_s[pl.ds(0, TILE)] = acc.astype(spec.dtype)
                    plgpu.commit_smem()

                    def copy(n, _):
                        n8 = pl.multiple_of(n * 8, 8)
                        to = pl.multiple_of(part + mt * TILE + n8, 8)
                        plgpu.copy_smem_to_gmem(
                            o_s.at[pl.ds(n8, 8)], part_ref.at[pl.ds(to, 8)]
                        )
                        return _

                    count = jnp.minimum(rows - mt * TILE, TILE) // 8
                    lax.fori_loop(0, count, copy, None)

            if cfg.share_buffer:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                copy_next_q()
            return end, i, cursor

        @pl.when(lo < hi)
        def _work():
            start = _start(ends_ref, s0)
            copy_q(s0)
            cursor = look_up(s0, lo - start)
            for i in range(stages):
                cursor = issue_if(i, cursor)

            def step(carry):
                segment, start, i, cursor = carry
                start, i, cursor = attend_segment(segment, start, i, cursor)
                return next_nonempty(segment), start, i, cursor

            lax.while_loop(
                lambda c: c[2] < hi - lo, step, (s0, start, jnp.int32(0), cursor)
            )
            plgpu.wait_smem_to_gmem(0)

    f32 = jnp.float32
    out_type = [
        jax.ShapeDtypeStruct((spec.part_rows, D), spec.dtype),
        jax.ShapeDtypeStruct((num_segments + cfg.num_ctas, MT * TILE), f32),
    ]
    if has_mass:
        blocks = _round_up(-(-page_table.shape[1] * ps // BLOCK), _MASS_BLOCKS)
        lead = (mass_last - mass_first, blocks)
        out_type += [
            jax.ShapeDtypeStruct((*lead, mass_rows, BLOCK), jnp.float16),
            jax.ShapeDtypeStruct((*lead, MT * TILE), f32),
        ]
    scratch = [
        plgpu.SMEM((MT * TILE, D), spec.dtype, transforms=_TILED),
        plgpu.SMEM((stages, BLOCK, 2 * D), spec.dtype, transforms=_TILED),
        None
        if cfg.share_buffer
        else plgpu.SMEM((TILE, D), spec.dtype, transforms=_TILED),
        plgpu.SMEM((TILE, BLOCK), jnp.float16, transforms=_TILED) if has_mass else None,
        plgpu.SMEM((TILE, BLOCK), spec.dtype, transforms=_TILED)
        if spec.interpret
        else None,
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    ]
    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(cfg.num_ctas,),
        grid_names=("cta",),
        kernel_name="paged_attention",
        **spec.options,
    )(
        jnp.asarray(static),
        ends,
        kv_lengths,
        q_lengths,
        page_table,
        packed,
        kv_pages,
    )


def _parts_of(ends_ref, segment, spec):
    """Returns the range of CTAs that own blocks of a segment (empty if it has none)."""
    C = spec.config.num_ctas
    start, end = _start(ends_ref, segment), ends_ref[segment]
    total = jnp.maximum(ends_ref[spec.num_segments - 1], 1)
    first = ((start + 1) * C - 1) // total
    return first, jnp.where(end > start, (end * C - 1) // total + 1, first)


def _full(shape, value, layout):
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _finish(spec, ends, kv_lengths, q_lengths, parts, lse, *stored):
    """Returns the output [T, N, D] and the mass [lanes, H, blocks, 64] if wanted.

    One launch: the first CTAs normalise and sum the stored probabilities of 1024 keys
    each, the others merge the parts of one token and KV head.
    """
    tokens = _token_table(spec)
    num_tokens, H = len(tokens), spec.num_heads
    out_type = [
        jax.ShapeDtypeStruct(
            (num_tokens, H * spec.group_size, spec.head_size), spec.dtype
        )
    ]
    num_mass = 0
    if stored:
        num_lanes = spec.groups[spec.mass_group].num_lanes
        num_blocks = stored[0].shape[1]
        chunks = num_blocks // _MASS_BLOCKS
        num_mass = num_lanes * H * chunks
        shape = (num_lanes, H, num_blocks, BLOCK)
        out_type.append(jax.ShapeDtypeStruct(shape, jnp.float32))

    def body(token_ref, ends_ref, kv_len_ref, q_len_ref, part_ref, lse_ref, *rest):
        index = lax.axis_index("work")
        lengths = (ends_ref, kv_len_ref, q_len_ref)

        @pl.when(index >= num_mass)
        def _merge():
            token, head = lax.div(index - num_mass, H), lax.rem(index - num_mass, H)
            out_ref = rest[2 if stored else 0]
            _merge_token(
                spec, token, head, token_ref, *lengths, part_ref, lse_ref, out_ref
            )

        if stored:
            prob_ref, max_ref, _, mass_ref, lse_s = rest

            @pl.when(index < num_mass)
            def _mass():
                chunk, segment = lax.rem(index, chunks), lax.div(index, chunks)
                lane, head = lax.div(segment, H), lax.rem(segment, H)
                _mass_chunk(
                    spec, lane, head, chunk, *lengths, lse_ref, prob_ref, max_ref,
                    mass_ref, lse_s,
                )  # fmt: skip

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(num_mass + num_tokens * H,),
        grid_names=("work",),
        kernel_name="paged_attention_finish",
        scratch_types=[plgpu.SMEM((spec.tiles.row_tiles * TILE,), jnp.float32)]
        if stored
        else [],
        **spec.options,
    )(jnp.asarray(tokens), ends, kv_lengths, q_lengths, parts, lse, *stored)


def _token_table(spec):
    """Returns lane, query, first tile, queries per tile, order, row, rows by token."""
    tiles, tokens, lane = spec.tiles, [], 0
    for index, (num_lanes, num_queries) in enumerate(spec.groups):
        step = tiles.queries_per_tile[index]
        for i in range(num_lanes):
            tile = tiles.group_first[index] + i * -(-num_queries // step)
            for query in range(num_queries):
                is_edge = int(index == spec.edge_group)
                row, rows = tiles.row[tile], tiles.rows[tile]
                tokens.append((lane + i, query, tile, step, is_edge, row, rows))
        lane += num_lanes
    return np.asarray(tokens, np.int32)


def _merge_token(
    spec, token, head, token_ref, ends_ref, kv_len_ref, q_len_ref, part_ref, lse_ref,
    out_ref,
):  # fmt: skip
    """Writes the output of one token and KV head, summed over the parts."""
    D, H, G = spec.head_size, spec.num_heads, spec.group_size
    # A row of D values over all 128 threads, so that G may be any number.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((1, D), (32 * max(1, D // 128),), (max(1, D // 128),))),
        warp_dims=(-3,) if D >= 128 else (-3, plgpu.Replicated(128 // D)),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    rows_layout = layout.reduce(1)
    lane, query, tile, per_tile, is_edge, row0, rows = (
        token_ref[token, n] for n in range(7)
    )
    q_len = q_len_ref[lane]
    # With 1 as the last query the order is the natural one.
    position = _edge_position(query, jnp.where(is_edge == 1, q_len - 1, 1))
    index = lax.div(position, per_tile)
    row = lax.rem(position, per_tile) * G
    segment = (tile + index) * H + head
    sees_keys = (query < q_len) & (kv_len_ref[lane, head] - q_len + query >= 0)
    base = (row0 + index * rows) * H + head * rows + row

    def add(cta, carry):
        acc, m, l = carry
        part = part_ref.at[pl.ds(base + cta * (spec.tiles.row_tiles * TILE), G)]
        log_sum = lse_ref.at[segment + cta, pl.ds(row, G)]
        x = plgpu.load(part, layout=layout, optimized=False).astype(jnp.float32)
        w = plgpu.load(log_sum, layout=rows_layout, optimized=False)
        m_new = jnp.maximum(m, w)
        old, new = jnp.exp2(m - m_new), jnp.exp2(w - m_new)
        acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
        acc += x * lax.broadcast_in_dim(new, acc.shape, [0])
        return acc, m_new, l * old + new

    init = (
        _full((G, D), 0.0, layout),
        _full((G,), 2 * MASK_VALUE, rows_layout),
        _full((G,), 0.0, rows_layout),
    )
    first, last = _parts_of(ends_ref, jnp.minimum(segment, spec.num_segments - 1), spec)
    last = jnp.where(sees_keys, last, first)
    acc, _, l = lax.fori_loop(first, last, add, init)
    l = jnp.where(l == 0.0, 1.0, l)
    acc = acc * lax.broadcast_in_dim(1.0 / l, acc.shape, [0])
    out_ref[token, pl.ds(head * G, G)] = acc.astype(spec.dtype)


def _mass_chunk(
    spec, lane, head, chunk, ends_ref, kv_len_ref, q_len_ref, lse_ref, prob_ref,
    max_ref, mass_ref, lse_s,
):  # fmt: skip
    """Writes the mass of 1024 keys of one lane and KV head."""
    H, G, tiles = spec.num_heads, spec.group_size, spec.tiles
    num_queries = spec.groups[spec.mass_group].num_queries
    per_tile = tiles.queries_per_tile[spec.mass_group]
    tiles_per_lane = -(-num_queries // per_tile)
    used_tiles = 1 if spec.mass_rows == "edges" else tiles_per_lane
    global_lane = lane + sum(g.num_lanes for g in spec.groups[: spec.mass_group])
    q_len = q_len_ref[global_lane]
    base = kv_len_ref[global_lane, head] - q_len
    used = q_len * G
    if spec.mass_rows == "edges":
        used = jnp.minimum(used, 2 * G)
    block0 = pl.multiple_of(chunk * _MASS_BLOCKS, _MASS_BLOCKS)
    blocks = pl.ds(block0, _MASS_BLOCKS)
    # Each thread holds 8 neighbouring keys of one block.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_MASS_BLOCKS, BLOCK), (_MASS_BLOCKS // 4, BLOCK), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )

    def add_tile(n, acc):
        index = (lane * tiles_per_lane + n) * H + head
        _final_log_sums(spec, spec.mass_segments[0] + index, ends_ref, lse_ref, lse_s)
        tile_rows = jnp.clip(used - n * per_tile * G, 0, per_tile * G)

        def add_rows(i, acc):
            for k in range(_MASS_ROWS):
                wanted = i * _MASS_ROWS + k
                row = jnp.minimum(wanted, tile_rows - 1)
                factor = jnp.where(wanted < tile_rows, 1.0, 0.0)
                p = prob_ref.at[index, blocks, row]
                m = max_ref.at[index, blocks, row]
                p = plgpu.load(p, layout=layout, optimized=False)
                m = plgpu.load(m, layout=layout.reduce(1), optimized=False)
                w = jnp.exp2(m - lse_s[row]) * factor
                p = p.astype(jnp.float32)
                acc += p * lax.broadcast_in_dim(w, acc.shape, [0])
            return acc

        steps = (tile_rows + _MASS_ROWS - 1) // _MASS_ROWS
        return lax.fori_loop(0, steps, add_rows, acc)

    acc = _full((_MASS_BLOCKS, BLOCK), 0.0, layout)
    for n in range(used_tiles):
        acc = lax.cond(
            block0 * BLOCK < base, functools.partial(add_tile, n), lambda a: a, acc
        )
    block = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=layout)
    key = plgpu.broadcasted_iota(jnp.int32, acc.shape, 1, layout=layout)
    key += (block + block0) * BLOCK
    share = 1.0 / jnp.maximum(used, 1).astype(jnp.float32)
    mass_ref[lane, head, blocks] = jnp.where(key < base, acc * share, 0.0)


def _final_log_sums(spec, segment, ends_ref, lse_ref, lse_s):
    """Writes the base-2 log sums of the rows of a segment over all its parts."""
    layout = plgpu.Layout.WGMMA.reduce(1)

    def add_part(cta, carry):
        new = []
        for t, (m, l) in enumerate(carry):
            w = lse_ref.at[segment + cta, pl.ds(t * TILE, TILE)]
            w = plgpu.load(w, layout=layout, optimized=False)
            m_new = jnp.maximum(m, w)
            new.append((m_new, l * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)))
        return tuple(new)

    init = (_full((TILE,), 2 * MASK_VALUE, layout), _full((TILE,), 0.0, layout))
    first, last = _parts_of(ends_ref, segment, spec)
    sums = lax.fori_loop(first, last, add_part, (init,) * spec.tiles.row_tiles)
    for t, (m, l) in enumerate(sums):
        lse_s[pl.ds(t * TILE, TILE)] = m + jnp.log2(l)
    plgpu.commit_smem()

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
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )


def _visible(kv_lengths, q_lengths, spec):
    """Returns how many keys every segment reads, int32 [S padded to 128]."""
    tiles = spec.tiles
    q_len = q_lengths[tiles.lane][:, None]
    base = kv_lengths[tiles.lane] - q_len
    first = tiles.first_query[:, None]
    last = jnp.minimum(first + tiles.num_queries[:, None], q_len)
    if spec.edge_group is not None:
        start, stop = spec.tiles.group_first[spec.edge_group :][:2]
        tile = np.arange(len(tiles.lane))
        has_edges = (tile >= start) & (tile < stop) & (tiles.first_query == 0)
        last = jnp.where(has_edges[:, None], q_len, last)
    visible = jnp.maximum(jnp.where(first < q_len, base + last, 0), 0).reshape(-1)
    return jnp.pad(visible, (0, -visible.shape[0] % 128))


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
    visible = _visible(kv_lengths, q_lengths, spec)
    parts, lse, *stored = _attend(
        spec,
        visible,
        kv_lengths,
        q_lengths,
        page_table,
        _pack(q, q_lengths, spec),
        kv_pages,
    )
    out = _merge(spec, visible, kv_lengths, q_lengths, parts, lse)
    if mass_group is None:
        return AttentionOutput(out, None)
    num_keys = page_table.shape[1] * page_size
    mass = _mass(spec, visible, kv_lengths, q_lengths, lse, *stored)
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


def _blocks_before(visible_ref, segment, spec):
    """Returns the number of blocks of the segments before `segment`."""
    (size,) = visible_ref.shape
    blocks = _blocks(plgpu.load(visible_ref, layout=plgpu.Layout.WG_STRIDED((size,), 1)))
    index = plgpu.broadcasted_iota(
        jnp.int32, (size,), 0, layout=plgpu.Layout.WG_STRIDED((size,), 1)
    )
    return jnp.sum(jnp.where(index < segment, blocks, 0))


def _attend(spec, visible, kv_lengths, q_lengths, page_table, packed, kv_pages):
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
    static = np.stack([tiles.lane, tiles.first_query, tiles.row, tiles.rows], axis=1)
    wgmma_rows = plgpu.Layout.WGMMA.reduce(1)

    def body(static_ref, visible_ref, kv_len_ref, q_len_ref, table_ref, q_ref, kv_ref,
             part_ref, lse_ref, *rest):  # fmt: skip
        if has_mass:
            prob_ref, max_ref, *rest = rest
        q_s, kv_s, o_s, l_s, p_s, q_bar, kv_bar = rest
        cta = lax.axis_index("cta")
        total = _blocks_before(visible_ref, num_segments, spec)
        lo = cta * total // cfg.num_ctas
        hi = (cta + 1) * total // cfg.num_ctas

        def nonempty(segment):
            """Returns the first segment with keys from `segment` on."""
            return lax.while_loop(
                lambda s: (s < num_segments - 1) & (visible_ref[s] == 0),
                lambda s: s + 1,
                segment,
            )

        def look_up(segment, block):
            visible = visible_ref[segment]
            lane = static_ref[lax.div(segment, H), 0]
            column = jnp.minimum(block * BLOCK, jnp.maximum(visible - 1, 0)) // ps
            return _Cursor(segment, block, visible, lane, table_ref[lane, column])

        def advance(cursor):
            is_last = cursor.block + 1 >= _blocks(cursor.visible)

            def next_segment():
                segment = jnp.minimum(cursor.segment + 1, num_segments - 1)
                return nonempty(segment), jnp.int32(0)

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
            return lax.cond(
                lo + i < hi, lambda c: issue(i, c), lambda c: c, cursor
            )

        def copy_q(segment):
            row = pl.multiple_of(static_ref[lax.div(segment, H), 2], 8)
            head = lax.rem(segment, H)
            plgpu.copy_gmem_to_smem(q_ref.at[head, pl.ds(row, MT * TILE)], q_s, q_bar)

        def attend_segment(segment, start, i0, cursor):
            tile_index, head = lax.div(segment, H), lax.rem(segment, H)
            visible = visible_ref[segment]
            lane, q0 = static_ref[tile_index, 0], static_ref[tile_index, 1]
            row0, rows = static_ref[tile_index, 2], static_ref[tile_index, 3]
            q_len = q_len_ref[lane]
            base = kv_len_ref[lane, head] - q_len
            first = jnp.maximum(lo - start, 0)
            last = jnp.minimum(hi - start, _blocks(visible))
            plgpu.barrier_wait(q_bar)

            def masked(logits, mt, key0):
                shape, layout = (TILE, BLOCK), plgpu.Layout.WGMMA
                row = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
                query = q0 + (row + mt * TILE) // G
                if spec.edge_group is not None:
                    is_edge = (segment >= mass_first) & (segment < mass_last)
                    query = jnp.where(is_edge, _edge_query(query, q_len - 1), query)
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
                    p_s[...] = p.astype(jnp.float16)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        p_s.at[pl.ds(0, count)],
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
                    row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, D), 0, layout=layout)
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
                        o_s[:, pl.ds(0, BLOCK)] = p
                        plgpu.commit_smem()
                        p = o_s.at[:, pl.ds(0, BLOCK)]

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

            @pl.when(end < hi)
            def _copy_next_q():
                copy_q(nonempty(segment + 1))

            part = row0 * H + head * rows + cta * (MT * TILE)
            for mt in range(MT):

                @pl.when(rows > mt * TILE)
                def _write(state=state[mt], mt=mt):
                    acc, m, l = state
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    l_s[...] = m + jnp.log2(l)
                    acc = acc * lax.broadcast_in_dim(1.0 / l, acc.shape, [0])
                    o_s[...] = acc.astype(spec.dtype)
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        l_s, lse_ref.at[segment + cta, pl.ds(mt * TILE, TILE)]
                    )

                    def copy(n, _):
                        n8 = pl.multiple_of(n * 8, 8)
                        to = pl.multiple_of(part + mt * TILE + n8, 8)
                        plgpu.copy_smem_to_gmem(
                            o_s.at[pl.ds(n8, 8)], part_ref.at[pl.ds(to, 8)]
                        )
                        return _

                    count = jnp.minimum(rows - mt * TILE, TILE) // 8
                    lax.fori_loop(0, count, copy, None)

            return end, i, cursor

        @pl.when(lo < hi)
        def _work():
            def halve(_, bounds):  # blocks before bounds[0] <= lo
                low, high = bounds
                middle = (low + high) // 2
                fits = _blocks_before(visible_ref, middle, spec) <= lo
                return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

            steps = max(1, num_segments).bit_length()
            s0, _ = lax.fori_loop(0, steps, halve, (jnp.int32(0), jnp.int32(num_segments)))
            start = _blocks_before(visible_ref, s0, spec)
            copy_q(s0)
            cursor = look_up(s0, lo - start)
            for i in range(stages):
                cursor = issue_if(i, cursor)

            def step(carry):
                segment, start, i, cursor = carry
                start, i, cursor = attend_segment(segment, start, i, cursor)
                segment = nonempty(jnp.minimum(segment + 1, num_segments - 1))
                return segment, start, i, cursor

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
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(cfg.num_ctas,),
        grid_names=("cta",),
        kernel_name="paged_attention",
        scratch_types=[
            plgpu.SMEM((MT * TILE, D), spec.dtype, transforms=_TILED),
            plgpu.SMEM((stages, BLOCK, 2 * D), spec.dtype, transforms=_TILED),
            plgpu.SMEM((TILE, D), spec.dtype, transforms=_TILED),
            plgpu.SMEM((TILE,), f32),
            plgpu.SMEM((TILE, BLOCK), jnp.float16, transforms=_TILED)
            if has_mass
            else None,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        ],
        **spec.options,
    )(
        jnp.asarray(static),
        visible,
        kv_lengths,
        q_lengths,
        page_table,
        packed,
        kv_pages,
    )


def _parts_of(visible_ref, segment, spec):
    """Returns the range of CTAs that own blocks of a segment (empty if it has none)."""
    C = spec.config.num_ctas
    start = _blocks_before(visible_ref, segment, spec)
    total = jnp.maximum(_blocks_before(visible_ref, spec.num_segments, spec), 1)
    end = start + _blocks(visible_ref[segment])
    first = ((start + 1) * C - 1) // total
    return first, jnp.where(end > start, (end * C - 1) // total + 1, first)


def _merge(spec, visible, kv_lengths, q_lengths, parts, lse):
    """Returns the output [T, N, D], each row summed over its parts."""
    tiles = spec.tiles
    D, H, G = spec.head_size, spec.num_heads, spec.group_size
    tokens = []
    lane = 0
    for index, (num_lanes, num_queries) in enumerate(spec.groups):
        for i in range(num_lanes):
            per_lane = -(-num_queries // tiles.queries_per_tile[index])
            tile = tiles.group_first[index] + i * per_lane
            for query in range(num_queries):
                tokens.append(
                    (lane + i, query, tile, tiles.queries_per_tile[index],
                     int(index == spec.edge_group), tiles.row[tile], tiles.rows[tile])
                )  # fmt: skip
        lane += num_lanes
    tokens = np.asarray(tokens, np.int32)
    width = min(D, 128)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((1, D), (width // 4 if D > 128 else 32,), (max(1, D // 128),))),
        warp_dims=(-3,) if D >= 128 else (-3, plgpu.Replicated(128 // D)),
        lane_dims=(-2,),
        vector_dim=-1,
    )

    def body(token_ref, visible_ref, kv_len_ref, q_len_ref, part_ref, lse_ref, out_ref):
        token, head = lax.axis_index("token"), lax.axis_index("head")
        lane, query, tile = (token_ref[token, n] for n in range(3))
        per_tile, is_edge = token_ref[token, 3], token_ref[token, 4]
        row0, rows = token_ref[token, 5], token_ref[token, 6]
        q_len = q_len_ref[lane]
        position = jnp.where(is_edge == 1, _edge_position(query, q_len - 1), query)
        index = position // per_tile
        row = lax.rem(position, per_tile) * G
        segment = (tile + index) * H + head
        first, last = _parts_of(visible_ref, segment, spec)
        sees_keys = (query < q_len) & (kv_len_ref[lane, head] - q_len + query >= 0)
        base = (row0 + index * rows) * H + head * rows + row
        row_layout = layout.reduce(1)

        def add(cta, carry):
            acc, m, l = carry
            part = base + cta * (tiles.row_tiles * TILE)
            x = plgpu.load(part_ref.at[pl.ds(part, G)], layout=layout, optimized=False)
            w = plgpu.load(
                lse_ref.at[segment + cta, pl.ds(row, G)],
                layout=row_layout,
                optimized=False,
            )
            m_new = jnp.maximum(m, w)
            old, new = jnp.exp2(m - m_new), jnp.exp2(w - m_new)
            acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
            acc += x.astype(jnp.float32) * lax.broadcast_in_dim(new, acc.shape, [0])
            return acc, m_new, l * old + new

        def full(shape, value, layout):
            return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        acc, _, l = lax.fori_loop(
            first,
            jnp.where(sees_keys, last, first),
            add,
            (
                full((G, D), 0.0, layout),
                full((G,), 2 * MASK_VALUE, row_layout),
                full((G,), 0.0, row_layout),
            ),
        )
        l = jnp.where(l == 0.0, 1.0, l)
        acc = acc * lax.broadcast_in_dim(1.0 / l, acc.shape, [0])
        out_ref[token, pl.ds(head * G, G)] = acc.astype(spec.dtype)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((len(tokens), H * G, D), spec.dtype),
        grid=(H, len(tokens)),
        grid_names=("head", "token"),
        kernel_name="paged_attention_merge",
        **spec.options,
    )(jnp.asarray(tokens), visible, kv_lengths, q_lengths, parts, lse)


def _mass(spec, visible, kv_lengths, q_lengths, lse, probabilities, maxima):
    """Returns the mass, float32 [lanes, H, blocks * 64]."""
    tiles, H, G = spec.tiles, spec.num_heads, spec.group_size
    num_lanes, num_queries = spec.groups[spec.mass_group]
    first_lane = sum(g.num_lanes for g in spec.groups[: spec.mass_group])
    per_tile = tiles.queries_per_tile[spec.mass_group]
    tiles_per_lane = 1 if spec.mass_rows == "edges" else -(-num_queries // per_tile)
    stride = -(-num_queries // per_tile)
    num_blocks = probabilities.shape[1]
    rows_padded = tiles.row_tiles * TILE
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((_MASS_BLOCKS, BLOCK), (_MASS_BLOCKS // 4, BLOCK), (8,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )

    def body(visible_ref, kv_len_ref, q_len_ref, lse_ref, prob_ref, max_ref, out_ref, s):
        lane, head = lax.axis_index("lane"), lax.axis_index("head")
        block0 = pl.multiple_of(lax.axis_index("chunk") * _MASS_BLOCKS, _MASS_BLOCKS)
        q_len = q_len_ref[first_lane + lane]
        base = kv_len_ref[first_lane + lane, head] - q_len
        used = q_len * G
        if spec.mass_rows == "edges":
            used = jnp.minimum(used, 2 * G)
        row_layout = layout.reduce(1)

        def add_tile(n, acc):
            index = (lane * stride + n) * H + head
            segment = spec.mass_segments[0] + index
            first, last = _parts_of(visible_ref, segment, spec)
            vector = plgpu.Layout.WGMMA.reduce(1)

            def add_part(cta, carry):
                new = []
                for t, (m, l) in enumerate(carry):
                    w = plgpu.load(
                        lse_ref.at[segment + cta, pl.ds(t * TILE, TILE)],
                        layout=vector,
                        optimized=False,
                    )
                    m_new = jnp.maximum(m, w)
                    new.append((m_new, l * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)))
                return tuple(new)

            def full(value):
                x = jnp.full((TILE,), value, jnp.float32)
                return plgpu.layout_cast(x, vector)

            init = ((full(2 * MASK_VALUE), full(0.0)),) * tiles.row_tiles
            for t, (m, l) in enumerate(lax.fori_loop(first, last, add_part, init)):
                s[pl.ds(t * TILE, TILE)] = m + jnp.log2(l)
            plgpu.commit_smem()
            tile_rows = jnp.clip(used - n * per_tile * G, 0, per_tile * G)

            def add_rows(i, acc):
                for k in range(_MASS_ROWS):
                    wanted = i * _MASS_ROWS + k
                    row = jnp.minimum(wanted, tile_rows - 1)
                    factor = jnp.where(wanted < tile_rows, 1.0, 0.0)
                    p = plgpu.load(
                        prob_ref.at[index, pl.ds(block0, _MASS_BLOCKS), row],
                        layout=layout,
                        optimized=False,
                    )
                    m = plgpu.load(
                        max_ref.at[index, pl.ds(block0, _MASS_BLOCKS), row],
                        layout=row_layout,
                        optimized=False,
                    )
                    w = jnp.exp2(m - s[row]) * factor
                    p = p.astype(jnp.float32)
                    acc += p * lax.broadcast_in_dim(w, acc.shape, [0])
                return acc

            steps = (tile_rows + _MASS_ROWS - 1) // _MASS_ROWS
            return lax.fori_loop(0, steps, add_rows, acc)

        acc = jnp.zeros((_MASS_BLOCKS, BLOCK), jnp.float32)
        acc = plgpu.layout_cast(acc, layout)
        for n in range(tiles_per_lane):
            acc = lax.cond(
                block0 * BLOCK < base, functools.partial(add_tile, n), lambda a: a, acc
            )
        shape = acc.shape
        block = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        key += (block + block0) * BLOCK
        share = 1.0 / jnp.maximum(used, 1).astype(jnp.float32)
        out_ref[lane, head, pl.ds(block0, _MASS_BLOCKS)] = jnp.where(
            key < base, acc * share, 0.0
        )

    mass = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_lanes, H, num_blocks, BLOCK), jnp.float32),
        grid=(num_lanes, H, num_blocks // _MASS_BLOCKS),
        grid_names=("lane", "head", "chunk"),
        kernel_name="paged_attention_mass",
        scratch_types=[plgpu.SMEM((rows_padded,), jnp.float32)],
        **spec.options,
    )(visible, kv_lengths, q_lengths, lse, probabilities, maxima)
    return mass.reshape(num_lanes, H, num_blocks * BLOCK)

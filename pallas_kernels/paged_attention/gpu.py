"""Paged attention for Hopper GPUs, in Pallas Mosaic GPU."""

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
_TILED_F32 = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
# Probabilities are kept relative to 2**-14 of the running maximum: float16 then
# holds 11 bits of everything down to 4e-9 of the maximum.
_HEADROOM = 14.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Tunables of one launch."""

    num_ctas: int = 264
    num_stages: int = 2
    copy_rows: int = 32


class _Tiles(NamedTuple):
    """Static layout: one entry per row tile (a lane's queries cut to MT * 64 rows)."""

    lane: np.ndarray
    first_query: np.ndarray
    num_queries: np.ndarray
    row: np.ndarray  # first row in the packed queries
    rows: np.ndarray  # rows, a multiple of 8
    group_first: tuple[int, ...]  # first tile of every group
    group_row: tuple[int, ...]  # first packed row of every group
    queries_per_tile: tuple[int, ...]
    row_tiles: int  # 64-row tiles per entry
    num_rows: int


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@functools.cache
def _tiles(groups: tuple[LaneGroup, ...], group_size: int) -> _Tiles:
    row_tiles = 1 if max(g.num_queries for g in groups) * group_size <= TILE else 2
    fields = []
    group_first, group_row, per_tile = [], [], []
    lane, row = 0, 0
    for num_lanes, num_queries in groups:
        step = min(num_queries, row_tiles * TILE // group_size)
        rows = _round_up(step * group_size, 8)
        group_first.append(len(fields))
        group_row.append(row)
        per_tile.append(step)
        for i in range(num_lanes):
            for first in range(0, num_queries, step):
                count = min(step, num_queries - first)
                fields.append((lane + i, first, count, row, rows))
                row += rows
        lane += num_lanes
    columns = np.asarray(fields, np.int32).T
    return _Tiles(
        *columns, tuple(group_first), tuple(group_row), tuple(per_tile), row_tiles, row
    )


def _edge_order(q_lengths, num_queries):
    """Returns the query of every row position: first, last valid, then the rest."""
    position = jnp.arange(num_queries)
    last = q_lengths[:, None] - 1
    order = _edge_query(position[None, :], last)
    return jnp.clip(order, 0, num_queries - 1)


def _edge_query(position, last):
    other = jnp.where(position - 1 < last, position - 1, position)
    return jnp.where(position == 0, 0, jnp.where(position == 1, last, other))


def _edge_position(q_lengths, num_queries):
    """Returns the row position of every query: inverse of `_edge_order`."""
    query = jnp.arange(num_queries)[None, :]
    last = q_lengths[:, None] - 1
    rest = jnp.where(query < last, query + 1, query)
    return jnp.where(query == 0, 0, jnp.where(query == last, 1, rest))


def _pack(q, q_lengths, groups, tiles, num_heads, edge_group):
    """Returns the rows of every tile behind each other, [H, num_rows + pad, D]."""
    group_size, head_size = q.shape[1] // num_heads, q.shape[2]
    packed, token, lane = [], 0, 0
    for index, (num_lanes, num_queries) in enumerate(groups):
        count = num_lanes * num_queries
        x = q[token : token + count].reshape(num_lanes, num_queries, -1)
        if index == edge_group:
            order = _edge_order(q_lengths[lane : lane + num_lanes], num_queries)
            x = jnp.take_along_axis(x, order[:, :, None], axis=1)
        step = tiles.queries_per_tile[index]
        padded = _round_up(num_queries, step)
        x = jnp.pad(x, ((0, 0), (0, padded - num_queries), (0, 0)))
        x = x.reshape(-1, step, num_heads, group_size, head_size)
        x = x.transpose(2, 0, 1, 3, 4)
        x = x.reshape(num_heads, -1, step * group_size, head_size)
        rows = _round_up(step * group_size, 8)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, rows - step * group_size), (0, 0)))
        packed.append(x.reshape(num_heads, -1, head_size))
        token, lane = token + count, lane + num_lanes
    pad = jnp.zeros((num_heads, tiles.row_tiles * TILE, head_size), q.dtype)
    return jnp.concatenate([*packed, pad], axis=1)


def _unpack(out, kv_lengths, q_lengths, groups, tiles, group_size, edge_group):
    """Returns [T, N, D] of the packed rows; rows that are not valid become zero."""
    num_heads, _, head_size = out.shape
    parts, lane = [], 0
    for index, (num_lanes, num_queries) in enumerate(groups):
        step = tiles.queries_per_tile[index]
        rows = _round_up(step * group_size, 8)
        count = num_lanes * -(-num_queries // step)
        first = tiles.group_row[index]
        x = out[:, first : first + count * rows].reshape(num_heads, count, rows, -1)
        x = x[:, :, : step * group_size]
        x = x.reshape(num_heads, num_lanes, -1, group_size, head_size)
        x = x[:, :, :num_queries].transpose(1, 2, 0, 3, 4)
        lanes = slice(lane, lane + num_lanes)
        q_len = q_lengths[lanes]
        if index == edge_group:
            order = _edge_position(q_len, num_queries)[:, :, None, None, None]
            x = jnp.take_along_axis(x, jnp.clip(order, 0, num_queries - 1), axis=1)
        query = jnp.arange(num_queries)
        sees = query[:, None] + (kv_lengths[lanes] - q_len[:, None])[:, None] >= 0
        valid = (query < q_len[:, None])[:, :, None] & sees
        x = jnp.where(valid[..., None, None], x, 0)
        parts.append(x.reshape(num_lanes * num_queries, -1, head_size))
        lane += num_lanes
    return jnp.concatenate(parts)


# Columns of the work table, one row per (tile, KV head).
_START, _END, _VISIBLE, _BASE, _LANE, _ROW, _ROWS, _QUERY = range(8)


def _plan(kv_lengths, q_lengths, tiles, num_ctas):
    """Returns the work table [S, 8] and the first segment of every CTA.

    Blocks of 64 keys of all segments stand behind each other; CTA c takes the blocks
    from c * total // C on.
    """
    num_heads = kv_lengths.shape[1]
    q_len = q_lengths[tiles.lane][:, None]
    kv_len = kv_lengths[tiles.lane]
    base = kv_len - q_len
    first = tiles.first_query[:, None]
    last = jnp.minimum(first + tiles.num_queries[:, None], q_len)
    visible = jnp.clip(jnp.where(first < q_len, base + last, 0), 0, None)
    blocks = (-(-visible // BLOCK)).reshape(-1)
    index = np.arange(blocks.shape[0])
    end = jnp.sum(jnp.where(index[None] <= index[:, None], blocks[None], 0), axis=1)
    head = np.arange(num_heads)[None]
    columns = (
        (end - blocks).reshape(visible.shape),
        end.reshape(visible.shape),
        visible,
        base,
        tiles.lane[:, None],
        tiles.row[:, None],
        tiles.rows[:, None],
        first,
    )
    table = jnp.stack([jnp.broadcast_to(c, visible.shape) for c in columns], axis=-1)
    del head
    table = table.reshape(-1, 8).astype(jnp.int32)
    cta = np.arange(num_ctas, dtype=np.int32)
    low = cta * end[-1] // num_ctas
    first_segment = jnp.sum(end[None] <= low[:, None], axis=1).astype(jnp.int32)
    return table, first_segment


def paged_attention_gpu(
    q,
    kv_pages,
    page_table,
    kv_lengths,
    q_lengths,
    *,
    groups,
    scale=None,
    mass_group=None,
    mass_rows="all",
    interpret=False,
    config: AttentionConfig | None = None,
):
    """Returns what `api.paged_attention` documents, computed on a Hopper GPU."""
    groups = tuple(LaneGroup(*g) for g in groups)
    num_pages, num_heads, page_size, row_size = kv_pages.shape
    head_size = row_size // 2
    group_size = q.shape[1] // num_heads
    scale = head_size**-0.5 if scale is None else scale
    config = config or AttentionConfig()
    tiles = _tiles(groups, group_size)
    edge_group = mass_group if mass_rows == "edges" else None
    if edge_group is not None and groups[edge_group].num_queries <= 2:
        edge_group = None
    table, first_segment = _plan(kv_lengths, q_lengths, tiles, config.num_ctas)
    packed = _pack(q, q_lengths, groups, tiles, num_heads, edge_group)
    spec = _Spec(
        num_heads=num_heads,
        head_size=head_size,
        group_size=group_size,
        page_size=page_size,
        num_segments=table.shape[0],
        row_tiles=tiles.row_tiles,
        num_rows=tiles.num_rows,
        scale=scale * _LOG2E,
        config=config,
        dtype=q.dtype,
        interpret=interpret,
    )
    parts, lse = _attend(spec, first_segment, table, page_table, packed, kv_pages)
    out = _merge(spec, tiles, table, parts, lse)
    out = _unpack(out, kv_lengths, q_lengths, groups, tiles, group_size, edge_group)
    return AttentionOutput(out, None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Spec:
    num_heads: int
    head_size: int
    group_size: int
    page_size: int
    num_segments: int
    row_tiles: int
    num_rows: int
    scale: float
    config: AttentionConfig
    dtype: object
    interpret: bool

    @property
    def part_rows(self):
        return self.num_rows * self.num_heads + (
            self.config.num_ctas * self.row_tiles * TILE
        )

    @property
    def params(self):
        return dict(
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=plgpu.InterpretGPUParams() if self.interpret else None,
        )


def _attend(spec, first_segment, table, page_table, packed, kv_pages):
    cfg = spec.config
    D, H, MT = spec.head_size, spec.num_heads, spec.row_tiles
    stages = cfg.num_stages
    copy_rows = min(cfg.copy_rows, spec.page_size, BLOCK)
    copies = BLOCK // copy_rows

    def body(seg_ref, tab, pages, q_ref, kv, o_ref, lse_ref, q_s, kv_s, o_s, l_s, p_s, qb, kb):
        cta = lax.axis_index("cta")
        total = tab[spec.num_segments - 1, _END]
        lo = cta * total // cfg.num_ctas
        hi = (cta + 1) * total // cfg.num_ctas

        def issue(i, cursor):
            """Starts the copies of local block i at the cursor; returns the next."""
            s, j = cursor
            slot = lax.rem(i, stages)
            lane = tab[s, _LANE]
            visible = tab[s, _VISIBLE]
            head = lax.rem(s, H)
            for c in range(copies):
                key = j * BLOCK + c * copy_rows

                @pl.when(key < visible)
                def _copy(c=c, key=key):
                    page = pages[lane, key // spec.page_size]
                    row = lax.rem(key, spec.page_size)
                    row = pl.multiple_of(row, copy_rows)
                    plgpu.copy_gmem_to_smem(
                        kv.at[page, head, pl.ds(row, copy_rows)],
                        kv_s.at[slot, pl.ds(c * copy_rows, copy_rows)],
                        kb.at[slot],
                    )

                @pl.when(key >= visible)
                def _skip():
                    plgpu.barrier_arrive(kb.at[slot])

            return advance(s, j + 1)

        def advance(s, j):
            last = (tab[s, _START] + j >= tab[s, _END]) & (tab[s, _END] < total)

            def next_segment(s):
                return lax.while_loop(
                    lambda t: tab[t, _END] == tab[t, _START], lambda t: t + 1, s + 1
                )

            s2 = lax.cond(last, next_segment, lambda s: s, s)
            return s2, jnp.where(last, 0, j)

        s0 = seg_ref[cta]
        j0 = lo - tab[s0, _START]
        cursor = (s0, j0)
        for i in range(stages):
            cursor = lax.cond(
                lo + i < hi, functools.partial(issue, i), lambda c: c, cursor
            )

        def segment(s, carry):
            i0, cursor = carry
            start, end = tab[s, _START], tab[s, _END]
            first = jnp.maximum(lo, start) - start
            last = jnp.minimum(hi, end) - start
            head = lax.rem(s, H)
            row0 = pl.multiple_of(tab[s, _ROW], 8)
            rows = tab[s, _ROWS]
            base, visible = tab[s, _BASE], tab[s, _VISIBLE]
            q0 = tab[s, _QUERY]
            plgpu.copy_gmem_to_smem(
                q_ref.at[head, pl.ds(row0, MT * TILE)], q_s, qb
            )
            plgpu.barrier_wait(qb)

            def block(j, carry):
                i, cursor, state = carry
                slot = lax.rem(i, stages)
                k_s = kv_s.at[slot, :, pl.ds(0, D)]
                v_s = kv_s.at[slot, :, pl.ds(D, D)]
                plgpu.barrier_wait(kb.at[slot])
                key0 = j * BLOCK

                @pl.when(key0 + BLOCK > visible)
                def _zero_unused_values():
                    v = plgpu.load(v_s, layout=plgpu.Layout.WGMMA, optimized=False)
                    row = plgpu.broadcasted_iota(
                        jnp.int32, (BLOCK, D), 0, layout=plgpu.Layout.WGMMA
                    )
                    v = jnp.where(row < visible - key0, v, jnp.zeros_like(v))
                    v_s[...] = v
                    plgpu.commit_smem()

                def mask(logits, mt):
                    shape = (TILE, BLOCK)
                    row = plgpu.broadcasted_iota(
                        jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA
                    )
                    key = plgpu.broadcasted_iota(
                        jnp.int32, shape, 1, layout=plgpu.Layout.WGMMA
                    )
                    query = q0 + (row + mt * TILE) // spec.group_size
                    limit = jnp.minimum(base + query + 1, visible)
                    return jnp.where(key + key0 < limit, logits, MASK_VALUE)

                def tile(mt, state):
                    acc, m, l = state

                    def qk(acc_ref):
                        plgpu.wgmma(acc_ref, q_s.at[pl.ds(mt * TILE, TILE)], k_s.T)
                        return acc_ref[...]

                    s = pl.run_scoped(qk, plgpu.ACC((TILE, BLOCK), jnp.float32))
                    s = s * spec.scale
                    s = lax.cond(
                        key0 + BLOCK > base + q0 + 1,
                        lambda s: mask(s, mt),
                        lambda s: s,
                        s,
                    )
                    m_new = jnp.maximum(m, s.max(axis=1) - _HEADROOM)
                    alpha = jnp.exp2(m - m_new)
                    p = jnp.exp2(s - lax.broadcast_in_dim(m_new, s.shape, [0]))
                    l = l * alpha + p.sum(axis=1)
                    acc = acc * lax.broadcast_in_dim(alpha, acc.shape, [0])
                    p16 = p.astype(spec.dtype)
                    if spec.interpret:  # its wgmma reads shared memory only
                        p_s[...] = p16
                        plgpu.commit_smem()
                        p16 = p_s

                    def pv(acc_ref):
                        plgpu.wgmma(acc_ref, p16, v_s)
                        return acc_ref[...]

                    acc += pl.run_scoped(pv, plgpu.ACC((TILE, D), jnp.float32))
                    return acc, m_new, l

                new = []
                for mt in range(MT):
                    if mt == 0:
                        new.append(tile(0, state[0]))
                    else:
                        new.append(
                            lax.cond(
                                rows > mt * TILE,
                                functools.partial(tile, mt),
                                lambda x: x,
                                state[mt],
                            )
                        )
                cursor = lax.cond(
                    lo + i + stages < hi,
                    lambda c: issue(i + stages, c),
                    lambda c: c,
                    cursor,
                )
                return i + 1, cursor, tuple(new)

            row_layout = plgpu.Layout.WGMMA.reduce(1)

            def full(shape, value, layout):
                return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

            init = tuple(
                (
                    full((TILE, D), 0.0, plgpu.Layout.WGMMA),
                    full((TILE,), MASK_VALUE, row_layout),
                    full((TILE,), 0.0, row_layout),
                )
                for _ in range(MT)
            )
            i, cursor, state = lax.fori_loop(first, last, block, (i0, cursor, init))
            part = row0 * H + head * rows + cta * (MT * TILE)
            for mt in range(MT):
                acc, m, l = state[mt]

                @pl.when(rows > mt * TILE)
                def _write(acc=acc, m=m, l=l, mt=mt):
                    l_s[...] = m + jnp.log2(l)
                    acc = acc / lax.broadcast_in_dim(l, acc.shape, [0])
                    tile_rows = jnp.minimum(rows - mt * TILE, TILE)
                    for half in range(D // 64):
                        o_s[...] = acc[:, half * 64 : half * 64 + 64]
                        plgpu.commit_smem()
                        if half == 0:
                            plgpu.copy_smem_to_gmem(
                                l_s, lse_ref.at[s + cta, pl.ds(mt * TILE, TILE)]
                            )

                        def copy(n, _, half=half):
                            n8 = pl.multiple_of(n * 8, 8)
                            plgpu.copy_smem_to_gmem(
                                o_s.at[pl.ds(n8, 8)],
                                o_ref.at[
                                    pl.ds(pl.multiple_of(part + mt * TILE + n8, 8), 8),
                                    pl.ds(half * 64, 64),
                                ],
                            )
                            return _

                        lax.fori_loop(0, tile_rows // 8, copy, None)
                        plgpu.wait_smem_to_gmem(0)

            return i, cursor

        def loop(carry):
            s, i, cursor = carry
            used = tab[s, _END] > tab[s, _START]
            i, cursor = lax.cond(
                used, lambda c: segment(s, c), lambda c: c, (i, cursor)
            )
            return s + 1, i, cursor

        lax.while_loop(lambda c: c[1] < hi - lo, loop, (s0, jnp.int32(0), cursor))

    f32 = jnp.float32
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((spec.part_rows, D), f32),
            jax.ShapeDtypeStruct((spec.num_segments + cfg.num_ctas, MT * TILE), f32),
        ),
        grid=(cfg.num_ctas,),
        grid_names=("cta",),
        scratch_types=[
            plgpu.SMEM((MT * TILE, D), spec.dtype, transforms=_TILED),
            plgpu.SMEM((stages, BLOCK, 2 * D), spec.dtype, transforms=_TILED),
            plgpu.SMEM((TILE, 64), f32, transforms=_TILED_F32),
            plgpu.SMEM((TILE,), f32),
            plgpu.SMEM((TILE, BLOCK), spec.dtype, transforms=_TILED),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        ],
        **spec.params,
    )(first_segment, table, page_table, packed, kv_pages)


def _merge(spec, tiles, table, parts, lse):
    """Returns the rows of all tiles, merged over their parts, [H, num_rows, D]."""
    D, H, MT, C = spec.head_size, spec.num_heads, spec.row_tiles, spec.config.num_ctas
    chunk_tile = np.repeat(np.arange(len(tiles.rows)), tiles.rows // 8).astype(np.int32)
    chunk_row = np.concatenate([np.arange(0, r, 8) for r in tiles.rows]).astype(np.int32)
    chunks = jnp.asarray(np.stack([chunk_tile, chunk_row], 1))
    vec = D // 32
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((4, D), (vec,))),
        warp_dims=(-3,),
        lane_dims=(-2,),
        vector_dim=-1,
    )

    def body(chunk_ref, tab, part_ref, lse_ref, o_ref):
        k = lax.axis_index("chunk")
        head = lax.axis_index("head")
        tile, row = chunk_ref[k, 0], chunk_ref[k, 1]
        s = tile * H + head
        start, end = tab[s, _START], tab[s, _END]
        total = jnp.maximum(tab[spec.num_segments - 1, _END], 1)
        c0 = ((start + 1) * C - 1) // total
        c1 = (end * C - 1) // total
        base = tab[s, _ROW] * H + head * tab[s, _ROWS] + row
        rows = layout.reduce(1)

        def add(c, carry):
            acc, m, l = carry
            part = pl.multiple_of(base + c * (MT * TILE), 8)
            x = plgpu.load(part_ref.at[pl.ds(part, 8)], layout=layout, optimized=False)
            w = plgpu.load(lse_ref.at[s + c, pl.ds(row, 8)], layout=rows, optimized=False)
            m_new = jnp.maximum(m, w)
            old, new = jnp.exp2(m - m_new), jnp.exp2(w - m_new)
            b = lambda y: lax.broadcast_in_dim(y, (8, D), [0])
            return acc * b(old) + x * b(new), m_new, l * old + new

        full = lambda shape, v, lay: plgpu.layout_cast(
            jnp.full(shape, v, jnp.float32), lay
        )
        init = (
            full((8, D), 0.0, layout),
            full((8,), MASK_VALUE * 2, rows),
            full((8,), 0.0, rows),
        )
        acc, _, l = lax.fori_loop(c0, jnp.where(end > start, c1 + 1, c0), add, init)
        l = jnp.where(l == 0.0, 1.0, l)
        out = acc / lax.broadcast_in_dim(l, (8, D), [0])
        o_ref[head, pl.ds(tab[s, _ROW] + row, 8)] = out.astype(spec.dtype)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((H, spec.num_rows, D), spec.dtype),
        grid=(chunks.shape[0], H),
        grid_names=("chunk", "head"),
        **spec.params,
    )(chunks, table, parts, lse)

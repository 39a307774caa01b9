"""The finishing launch of paged attention for Hopper GPUs.

Merges the parts of every token and KV head, and turns stored probabilities into mass.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    MASS_BLOCKS,
    TILE,
    Spec,
    edge_position,
    full,
    part_row,
    parts_of,
)
from pallas_kernels.paged_attention.gpu_mass import mass_chunk


def finish(spec: Spec, ends, kv_lengths, q_lengths, parts, log_sums, *stored):
    """Returns the output [T, N, D] and, if wanted, the mass [lanes, H, blocks, 64].

    The first CTAs sum the stored probabilities of 1024 keys each, the others merge the
    parts of one token and KV head.
    """
    H, last = spec.num_heads, spec.groups[-1]
    num_tokens = last.first_token + last.num_lanes * last.num_queries
    shape = (num_tokens, H * spec.group_size, spec.head_size)
    outputs = [jax.ShapeDtypeStruct(shape, spec.dtype)]
    scratch = []
    num_mass, chunks = 0, -(-spec.mass_blocks // MASS_BLOCKS)
    if stored:
        num_lanes = spec.groups[spec.mass_group].num_lanes
        num_mass = num_lanes * H * chunks
        shape = (num_lanes, H, spec.mass_blocks, BLOCK)
        outputs.append(jax.ShapeDtypeStruct(shape, jnp.float32))
        tiles = spec.groups[spec.mass_group].tiles_per_lane
        scratch = [plgpu.SMEM((tiles, TILE), jnp.float32)]

    def body(ends, kv_lengths, q_lengths, parts, log_sums, *rest):
        work = lax.axis_index("work")
        lengths = (ends, kv_lengths, q_lengths)

        @pl.when(work >= num_mass)
        def _merge():
            token, head = lax.div(work - num_mass, H), lax.rem(work - num_mass, H)
            out = rest[2] if stored else rest[0]
            _merge_token(spec, token, head, *lengths, parts, log_sums, out)

        if stored:
            probabilities, maxima, _, mass, final = rest

            @pl.when(work < num_mass)
            def _mass():
                chunk, segment = lax.rem(work, chunks), lax.div(work, chunks)
                where = (lax.div(segment, H), lax.rem(segment, H), chunk)
                refs = (log_sums, probabilities, maxima, mass, final)
                mass_chunk(spec, *where, *lengths, *refs)

    return plgpu.kernel(
        body,
        out_type=outputs,
        grid=(num_mass + num_tokens * H,),
        grid_names=("work",),
        kernel_name="paged_attention_finish",
        scratch_types=scratch,
        **spec.options,
    )(ends, kv_lengths, q_lengths, parts, log_sums, *stored)


def _find_token(spec: Spec, token):
    """Returns lane, query, first tile, its row and rows, its queries, has edges."""
    fields = None
    for number, group in enumerate(spec.groups):
        local = token - group.first_token
        lane, query = (
            lax.div(local, group.num_queries),
            lax.rem(local, group.num_queries),
        )
        tile = lane * group.tiles_per_lane
        of_group = (
            group.first_lane + lane,
            query,
            group.first_tile + tile,
            group.first_row + tile * group.rows,
            jnp.int32(group.rows),
            jnp.int32(group.step),
            jnp.int32(number == spec.edge_group),
        )
        if fields is None:
            fields = of_group
        else:
            pairs = zip(of_group, fields, strict=True)
            fields = tuple(jnp.where(local >= 0, new, old) for new, old in pairs)
    return fields


def _merge_token(
    spec: Spec, token, head, ends, kv_lengths, q_lengths, parts, log_sums, out
):
    """Writes the output of one token and KV head, summed over its parts."""
    D, H, G = spec.head_size, spec.num_heads, spec.group_size
    at_once = spec.parts_at_once
    # A row of D values lies across all 128 threads, so that G may be any number.
    vector = max(1, D // 128)
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((1, D), (32 * vector,), (vector,))),
        warp_dims=(-3,) if D >= 128 else (-3, plgpu.Replicated(128 // D)),
        lane_dims=(-2,),
        vector_dim=-1,
    )
    lane, query, tile, tile_row, tile_rows, step, is_edge = _find_token(spec, token)
    q_len, kv_len = q_lengths[lane], kv_lengths[lane, head]
    # With 1 as the last query the order is the natural one.
    position = edge_position(query, jnp.where(is_edge == 1, q_len - 1, 1))
    number, row = lax.div(position, step), lax.rem(position, step) * G
    segment = (tile + number) * H + head
    segment = jnp.clip(segment, 0, spec.num_segments - 1)
    first, last = parts_of(ends, segment, spec)
    sees_keys = (query < q_len) & (kv_len - q_len + query >= 0)
    last = jnp.where(sees_keys, last, first)
    tile_row += number * tile_rows

    def load(cta):
        """Returns rows and log sums of a part; nothing past the last one."""
        index = jnp.minimum(cta, last - 1)
        base = part_row(spec, tile_row, tile_rows, head, index) + row
        x = plgpu.load(parts.at[pl.ds(base, G)], layout=layout, optimized=False)
        w = log_sums.at[segment + index, pl.ds(row, G)]
        w = plgpu.load(w, layout=layout.reduce(1), optimized=False)
        return x.astype(jnp.float32), w + jnp.where(cta < last, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        acc, m, total = carry
        loaded = [load(first + i * at_once + k) for k in range(at_once)]
        for x, w in loaded:
            m_new = jnp.maximum(m, w)
            old, new = jnp.exp2(m - m_new), jnp.exp2(w - m_new)
            acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
            acc += x * lax.broadcast_in_dim(new, acc.shape, [0])
            m, total = m_new, total * old + new
        return acc, m, total

    init = (
        full((G, D), 0.0, layout),
        full((G,), 1.5 * MASK_VALUE, layout.reduce(1)),
        full((G,), 0.0, layout.reduce(1)),
    )
    steps = lax.div(last - first + (at_once - 1), at_once)
    acc, _, total = lax.fori_loop(0, steps, add, init)
    total = jnp.where(total == 0.0, 1.0, total)
    acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
    out[token, pl.ds(head * G, G)] = acc.astype(spec.dtype)

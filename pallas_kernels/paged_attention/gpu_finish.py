"""The finishing launch of paged attention for Hopper GPUs.

Merges the parts of every token and KV head, and turns stored probabilities into mass.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.gpu_layouts import row_layout
from pallas_kernels.paged_attention.gpu_layout import (
    FEW_PARTS,
    TILE,
    Spec,
    edge_position,
    full,
)
from pallas_kernels.paged_attention.gpu_mass import write_mass
from pallas_kernels.paged_attention.gpu_plan import (
    part_index,
    part_row,
    parts_of,
    pieces_of_row,
)


def finish(spec: Spec, plan, kv_lengths, q_lengths, parts, log_sums, *stored):
    """Returns the output [T, N, D]; writes the mass where one is wanted.

    The first CTAs sum stored probabilities, `mass_ctas` for every lane and KV head; the
    others merge the parts of `heads_at_once` heads of a token.

    Args:
      spec: static sizes.
      plan, kv_lengths, q_lengths: what `attend` was given.
      parts, log_sums: what it returned.
      *stored: with mass, probabilities and maxima that it returned, int32 [1] and a
        Ref [n, lanes, H, blocks, 64]; the mass goes to that place of the n.
    """
    H, last = spec.num_heads, spec.groups[-1]
    num_tokens = last.first_token + last.num_lanes * last.num_queries
    shape = (spec.num_out_tokens, H * spec.group_size, spec.head_size)
    num_mass, head_groups = 0, H // spec.heads_at_once
    if stored:
        num_mass = spec.groups[spec.mass_group].num_lanes * H * spec.mass_ctas

    def body(plan, kv_lengths, q_lengths, parts, log_sums, *rest):
        *rest, out, final_s = rest
        work = lax.axis_index("work")
        lengths = (plan, kv_lengths, q_lengths)

        @pl.when(work >= num_mass)
        def _merge():
            token = lax.div(work - num_mass, head_groups)
            head = lax.rem(work - num_mass, head_groups) * spec.heads_at_once
            _merge_token(spec, token, head, *lengths, parts, log_sums, out)

        if stored:
            probabilities, maxima, place, mass = rest

            @pl.when(work < num_mass)
            def _mass():
                number, first = (
                    lax.div(work, spec.mass_ctas),
                    lax.rem(work, spec.mass_ctas),
                )
                where = (lax.div(number, H), lax.rem(number, H), first)
                refs = (log_sums, probabilities, maxima, mass.at[place[0]], final_s)
                write_mass(spec, *where, *lengths, *refs)

    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, spec.dtype),
        grid=(num_mass + num_tokens * head_groups,),
        grid_names=("work",),
        kernel_name="paged_attention_finish",
        scratch_types=[plgpu.SMEM((1, TILE), jnp.float32) if stored else None],
        **spec.options,
    )(plan, kv_lengths, q_lengths, parts, log_sums, *stored)


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
    spec: Spec, token, first_head, plan, kv_lengths, q_lengths, parts, log_sums, out
):
    """Writes the output of some KV heads of a token, summed over their parts."""
    H, G, at_once = spec.num_heads, spec.group_size, spec.parts_at_once
    heads = [first_head + i for i in range(spec.heads_at_once)]
    layout = row_layout(spec.head_size, rows=G)
    lane, query, tile, tile_row, tile_rows, step, is_edge = _find_token(spec, token)
    q_len = q_lengths[lane]
    # With 1 as the last query the order is the natural one.
    position = edge_position(query, jnp.where(is_edge == 1, q_len - 1, 1))
    number, row = lax.div(position, step), lax.rem(position, step) * G
    tile_row += number * tile_rows
    first_segment = jnp.minimum((tile + number) * H, spec.num_segments - H)
    segments = [first_segment + head for head in heads]

    def parts_of_head(head, segment):
        first, last = parts_of(plan, segment, spec)
        own = kv_lengths[lane, head] - q_len + query  # its own key
        last = pieces_of_row(spec, segment, own, last)
        return first, jnp.where((query < q_len) & (own >= 0), last, first)

    ranges = [parts_of_head(*pair) for pair in zip(heads, segments, strict=True)]

    def load(i, k):
        """Returns rows and log sums of a part of head i; nothing past the last one."""
        cta, last = ranges[i][0] + k, ranges[i][1]
        index = jnp.maximum(jnp.minimum(cta, last - 1), 0)
        base = part_row(spec, tile_row, tile_rows, segments[i], index) + row
        x = plgpu.load(parts.at[pl.ds(base, G)], layout=layout, optimized=False)
        w = log_sums.at[part_index(spec, segments[i], index), pl.ds(row, G)]
        w = plgpu.load(w, layout=layout.reduce(1), optimized=False)
        return x.astype(jnp.float32), w + jnp.where(cta < last, 0.0, 2 * MASK_VALUE)

    def add(at_once, first, turn, carry):
        numbers = [first + turn * at_once + k for k in range(at_once)]
        loaded = [[load(i, k) for k in numbers] for i in range(len(heads))]
        return [_add_parts(*pair) for pair in zip(carry, loaded, strict=True)]

    zero = (
        full((G, spec.head_size), 0.0, layout),
        full((G,), 1.5 * MASK_VALUE, layout.reduce(1)),
        full((G,), 0.0, layout.reduce(1)),
    )
    longest = functools.reduce(jnp.maximum, [last - first for first, last in ranges])
    sums, done = [zero] * len(heads), 0
    for count in sorted({at_once, min(at_once, FEW_PARTS)}, reverse=True):
        left = longest - done
        if count > FEW_PARTS:  # the others are loaded a few at a time
            steps = lax.div(left, count)
        else:
            steps = lax.div(left + (count - 1), count)
        sums = lax.fori_loop(0, steps, functools.partial(add, count, done), sums)
        done += steps * count
    for head, (first, last), state in zip(heads, ranges, sums, strict=True):
        window = out.at[token, pl.ds(head * G, G)]
        _write_rows(window, *state[::2], last > first, layout)


def _write_rows(out, acc, total, has_parts, layout):
    """Writes rows divided by their sums; zeros without parts, which hold anything."""

    @pl.when(has_parts)
    def _write():
        share = 1.0 / jnp.where(total == 0.0, 1.0, total)
        rows = acc * lax.broadcast_in_dim(share, acc.shape, [0])
        out[...] = rows.astype(out.dtype)

    @pl.when(jnp.logical_not(has_parts))
    def _clear():
        out[...] = full(acc.shape, 0.0, layout).astype(out.dtype)


def _add_parts(carry, loaded):
    """Returns (sum of rows, maximum, sum of weights) with those of some parts."""
    acc, m, total = carry
    for x, w in loaded:
        m_new = jnp.maximum(m, w)
        old, new = jnp.exp2(m - m_new), jnp.exp2(w - m_new)
        acc = acc * lax.broadcast_in_dim(old, acc.shape, [0])
        acc += x * lax.broadcast_in_dim(new, acc.shape, [0])
        m, total = m_new, total * old + new
    return acc, m, total

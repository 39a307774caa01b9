"""The persistent attention launch for Hopper GPUs.

Every CTA walks its share of the stream of all 64-key blocks. What it computes of a
segment is one part, or one for every piece; parts are written normalised, with the log
of their sum.
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
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    GROUP,
    TILE,
    Spec,
    full,
    num_blocks,
)
from pallas_kernels.paged_attention.gpu_mass import pack
from pallas_kernels.paged_attention.gpu_plan import (
    Visit,
    num_part_rows,
    num_parts,
    part_blocks,
    part_index,
    part_number,
    part_row,
    with_share,
)
from pallas_kernels.paged_attention.gpu_shares import blocks_before
from pallas_kernels.paged_attention.gpu_stream import Cursor, Segment, Stream

_SMALLEST = 2.0**-100  # of the largest probability of a row in a block
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))


@dataclasses.dataclass(frozen=True, eq=False)
class _Attend:
    """What one CTA computes, and where it goes."""

    spec: Spec
    stream: Stream
    parts: Any  # out: [rows, D]
    log_sums: Any  # out: float32 [parts, 64], base 2
    probabilities: Any  # out: int32 [segments, blocks, rows, words], or None
    maxima: Any  # out: float32 [segments, blocks, 64], or None
    tile_s: Any  # queries, then results of a segment
    mass_s: Any
    weight_s: Any

    def mask(self, logits, segment: Segment, first_key):
        """Returns logits with the keys hidden that a row must not see."""
        row = plgpu.broadcasted_iota(jnp.int32, logits.shape, 0, layout=WGMMA)
        key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=WGMMA)
        query = segment.tile.first_query + row // self.spec.group_size
        query = self.stream.query_at(query, segment.index, segment.q_len)
        limit = jnp.minimum(segment.base + query + 1, segment.visible)
        return jnp.where(key + first_key < limit, logits, MASK_VALUE)

    def zero_unused_values(self, segment: Segment, values_s, first_key):
        """Clears value rows past the length: 0 * NaN would be NaN."""

        @pl.when(first_key + BLOCK > segment.visible)
        def _clear():
            values = plgpu.load(values_s, layout=WGMMA, optimized=False)
            row = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=WGMMA)
            is_used = row < segment.visible - first_key
            values_s[...] = jnp.where(is_used, values, jnp.zeros_like(values))
            plgpu.commit_smem()

    def store_probabilities(self, p, m, top, segment: Segment, block):
        """Keeps what the mass needs of one block; `top` is its largest logit."""
        count, bits = self.spec.mass_tile_rows, self.spec.config.mass_bits
        first, last = self.spec.mass_segments
        first_key = block * BLOCK

        def only_candidates(p, _):
            key = plgpu.broadcasted_iota(jnp.int32, p.shape, 1, layout=WGMMA)
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
            self.mass_s[...] = jnp.concatenate(words, axis=1)
            plgpu.commit_smem()
            index = segment.index - first
            plgpu.copy_smem_to_gmem(
                self.mass_s.at[pl.ds(0, count)],
                self.probabilities.at[index, block, pl.ds(0, count)],
            )
            self.maxima[index, block] = m + jnp.log2(largest)

    def attend_block(self, segment: Segment, block, slot, state):
        """Returns (sum of values, maximum, sum) of all rows with one more block."""
        spec = self.spec
        acc, m, total = state
        keys_s = self.stream.kv_s.at[slot, :, pl.ds(0, spec.head_size)]
        values_s = self.stream.kv_s.at[slot, :, pl.ds(spec.head_size, spec.head_size)]
        first_key = block * BLOCK
        self.zero_unused_values(segment, values_s, first_key)

        def multiply_keys(acc_ref):
            plgpu.wgmma(acc_ref, self.tile_s, keys_s.T)
            return acc_ref[...]

        s = pl.run_scoped(multiply_keys, plgpu.ACC((TILE, BLOCK), jnp.float32))
        s = s * spec.scale
        s = lax.cond(
            first_key + BLOCK > segment.seen,
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

    def place_queries(self):
        """Moves queries to where the matrix unit reads them."""
        queries = plgpu.load(self.stream.q_s, layout=TILED_ROWS, optimized=False)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        self.tile_s[...] = queries
        plgpu.commit_smem()

    def copy_next_queries(self, segment: Segment):
        """Asks for the queries of the next segment, if there is one."""
        stream = self.stream
        end, high = stream.plan[segment.index], stream.share.high
        if stream.share.turn is not None:
            is_turn = stream.turns(segment.index, end)
            end = jnp.where(is_turn, stream.share.pieces.unit, end)

        @pl.when(end < high)
        def _copy():
            stream.copy_queries(stream.next_visit(segment.index).segment)

    def attend_segment(self, index, start, i, cursor: Cursor):
        """Computes this CTA's parts of a segment; returns the next i and cursor."""
        spec, stream = self.spec, self.stream
        segment = stream.segment(index)
        low, high = stream.share.range_of(start)
        first, last = blocks_before(low, start), blocks_before(high, start)
        last = jnp.minimum(last, num_blocks(segment.visible))
        plgpu.barrier_wait(stream.q_bar)
        if spec.piece is None:
            return self.attend_part(segment, first, last, last, i, cursor)
        size = part_blocks(spec, index, first, last)

        def step(carry):
            first, *carry = carry
            end = jnp.minimum(first + size, last)
            return end, *self.attend_part(segment, first, end, last, *carry)

        carry = first, i, cursor
        return lax.while_loop(lambda carry: carry[0] < last, step, carry)[1:]

    def attend_part(self, segment: Segment, first, end, last, i, cursor: Cursor):
        """Computes one part of a segment, of which this CTA has blocks up to `last`."""
        spec, stream = self.spec, self.stream
        self.place_queries()
        pl.when(end == last)(lambda: self.copy_next_queries(segment))

        def step(block, carry):
            i, cursor, state = carry
            slot = lax.rem(i, spec.config.num_stages)
            plgpu.barrier_wait(stream.kv_bar.at[slot])
            state = self.attend_block(segment, block, slot, state)
            cursor = stream.copy_block_if_mine(i + spec.config.num_stages, cursor)
            return i + 1, cursor, state

        state = (
            full((TILE, spec.head_size), 0.0, WGMMA),
            full((TILE,), MASK_VALUE, WGMMA_ROWS),
            full((TILE,), 0.0, WGMMA_ROWS),
        )
        i, cursor, state = lax.fori_loop(first, end, step, (i, cursor, state))
        number = part_number(spec, segment.index, stream.share, first)
        self.write_part(segment, number, *state)
        return i, cursor

    def write_part(self, segment: Segment, number, acc, m, total):
        """Writes the normalised sum of values of all rows and the log of the sum."""
        tile = segment.tile
        self.log_sums[part_index(self.spec, segment.index, number)] = m + jnp.log2(
            total
        )
        acc = acc * lax.broadcast_in_dim(1.0 / total, acc.shape, [0])
        self.tile_s[...] = acc.astype(self.spec.dtype)
        plgpu.commit_smem()
        part = part_row(self.spec, tile.row, tile.rows, segment.index, number)

        def copy(n, _):
            row = pl.multiple_of(n * 8, 8)
            to = pl.multiple_of(part + row, 8)
            source = self.tile_s.at[pl.ds(row, 8)]
            plgpu.copy_smem_to_gmem(source, self.parts.at[pl.ds(to, 8)])

        lax.fori_loop(0, lax.div(tile.rows, 8), copy, None)

    def run(self, first: Visit):
        """Computes all blocks of this CTA, from the first on."""
        stream = self.stream
        cursor = stream.cursor(first)
        for i in range(self.spec.config.num_stages):
            cursor = stream.copy_block_if_mine(jnp.int32(i), cursor)
            if i == 0:
                stream.copy_queries(first.segment)

        def step(carry):
            visit, i, cursor = carry
            i, cursor = self.attend_segment(visit.segment, visit.start, i, cursor)
            return stream.next_visit(visit.segment), i, cursor

        lax.while_loop(
            lambda carry: carry[0].unit < stream.share.high,
            step,
            (first, jnp.int32(0), cursor),
        )
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def attend(spec: Spec, plan, kv_lengths, q_lengths, page_table, q, kv_pages):
    """Returns parts, log sums and, where mass is wanted, probabilities and maxima.

    A part has its rows at `part_row` and its log sums at `part_index`.
    """
    has_mass = spec.mass_group is not None
    out_type = [
        jax.ShapeDtypeStruct((num_part_rows(spec), spec.head_size), spec.dtype),
        jax.ShapeDtypeStruct((num_parts(spec), TILE), jnp.float32),
    ]
    if has_mass:
        first, last = spec.mass_segments
        lead = (last - first, spec.mass_blocks)
        stored = (*lead, max(GROUP, spec.mass_tile_rows), spec.mass_words)
        out_type.append(jax.ShapeDtypeStruct(stored, jnp.int32))
        out_type.append(jax.ShapeDtypeStruct((*lead, TILE), jnp.float32))

    def entry(plan, kv_lengths, q_lengths, table, queries, pages, *refs):
        outputs, scratch = refs[: len(out_type)], refs[len(out_type) :]
        outputs += (None,) * (4 - len(outputs))
        q_s, kv_s, q_bar, kv_bar, *scratch = scratch
        inputs = (plan, kv_lengths, q_lengths, table, queries, pages)

        def run(share, first):
            stream = Stream(spec, share, *inputs, q_s, kv_s, q_bar, kv_bar)
            _Attend(spec, stream, *outputs, *scratch).run(first)

        with_share(spec, lax.axis_index("cta"), plan, run)

    return plgpu.kernel(
        entry,
        out_type=out_type,
        grid=(spec.config.num_ctas,),
        grid_names=("cta",),
        kernel_name="paged_attention",
        scratch_types=_scratch(spec, has_mass),
        **spec.options,
    )(plan, kv_lengths, q_lengths, page_table, q, kv_pages)


def _scratch(spec: Spec, has_mass: bool) -> list:
    """Returns the shared memory of one CTA: of its `Stream`, then of `_Attend`."""
    D, words, config = spec.head_size, spec.mass_words, spec.config
    copies = BLOCK // min(config.copy_rows, spec.page_size, BLOCK)
    smem = functools.partial(plgpu.SMEM, transforms=_TILED)
    return [
        _rows((TILE, D), 64, spec.dtype),
        smem((config.num_stages, BLOCK, 2 * D), spec.dtype),
        plgpu.Barrier(num_arrivals=spec.tile_queries),
        plgpu.Barrier(num_arrivals=copies, num_barriers=config.num_stages),
        smem((TILE, D), spec.dtype),
        _rows((TILE, words), words, jnp.int32) if has_mass else None,
        smem((TILE, BLOCK), spec.dtype) if spec.interpret else None,
    ]


def _rows(shape, columns: int, dtype):
    """Returns shared memory of rows as they lie, for copies of any number of rows.

    Without transforms the compiler may choose a swizzle, for multiples of 8 rows only.
    """
    transforms = (plgpu.TilingTransform((1, columns)),)
    return plgpu.SMEM(shape, dtype, transforms=transforms)

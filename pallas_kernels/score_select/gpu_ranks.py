"""Channels that are kept, sums of columns and counts of ranks, thread by thread.

None of this has a Pallas form; the interpreter runs the same steps on whole arrays.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, llvm, memref, scf, vector
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_counting import element
from pallas_kernels.score_select.codes import CodeLayout, ranges_of
from pallas_kernels.score_select.gpu_scores import CHANNELS, TileSpec, key_of_register
from pallas_kernels.score_select.reference import (
    LOWEST_RANK,
    RANK_SHIFT,
    RECENT_RANK,
    SAMPLED_GROUPS,
    ranks_of,
)


def _const(value):
    return mgpu.c(value, ir.IntegerType.get_signless(32))


def _index(value):
    return arith.index_cast(ir.IndexType.get(), value)


def _values(array):
    """The values of a thread, in the order of its registers."""
    return [
        element(register, i)
        for register in array.registers.flat
        for i in range(ir.VectorType(register.type).shape[0])
    ]


def _if(condition, then):
    """Runs `then` where a thread's condition holds."""
    branch = scf.IfOp(condition)
    with ir.InsertionPoint(branch.then_block):
        then()
        scf.yield_([])


def sampled_ranges(layout: CodeLayout, refs, place, layouts, interpret):
    """Returns sums of steps, and the mean middle of ranges, float32 [D] each.

    Of at most 16 groups, spread over the text.

    Args:
      layout: of the codes.
      refs: codes [P, H, groups, row] and table [lanes, W].
      place: lane, head and length, int32.
      layouts: of [D], and of one value per thread.
      interpret: run on whole arrays.
    """
    half = layout.levels + (layout.levels - 1) / 2  # steps from the base
    if interpret:
        codes_ref, table_ref = refs
        lane, head, length = place
        num_groups = -(-length // layout.group)
        sampled = jnp.minimum(num_groups, SAMPLED_GROUPS)
        step = middle = jnp.zeros(layout.head_size, jnp.float32)
        for i in range(SAMPLED_GROUPS):
            group = jnp.where(i < sampled, i * num_groups // jnp.maximum(sampled, 1), 0)
            page = table_ref[lane, group // layout.groups]
            page = jnp.clip(page, 0, codes_ref.shape[0] - 1)
            low, wide = ranges_of(codes_ref[page, head, group % layout.groups], layout)
            step += jnp.where(i < sampled, wide, 0.0)
            middle += jnp.where(i < sampled, low + half * wide, 0.0)
        return step, middle / jnp.maximum(sampled, 1)
    by_channel, by_thread = layouts
    result = plgpu.ShapeDtypeStruct((layout.head_size,), jnp.float32, layout=by_channel)

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, *[by_thread] * 3),
        return_type=(result, result),
    )
    def sample(ctx, codes, table, *place):
        del ctx
        lane, head, length = (_values(x)[0] for x in place)
        num_pages = ir.MemRefType(codes.type).shape[0]
        channel = arith.andi(mgpu.thread_idx(), _const(layout.head_size - 1))
        num_groups = arith.divui(
            arith.addi(length, _const(layout.group - 1)), _const(layout.group)
        )
        sampled = arith.minui(num_groups, _const(SAMPLED_GROUPS))
        divisor = arith.maxui(sampled, _const(1))
        f32 = ir.F32Type.get()
        zero = arith.constant(f32, 0.0)
        words = []
        for i in range(SAMPLED_GROUPS):  # all loads before what waits for them
            is_one = arith.cmpi(arith.CmpIPredicate.ult, _const(i), sampled)
            group = arith.divui(arith.muli(num_groups, _const(i)), divisor)
            group = arith.select(is_one, group, _const(0))
            column = arith.divui(group, _const(layout.groups))
            page = memref.load(table, [_index(lane), _index(column)])
            page = arith.minsi(arith.maxsi(page, _const(0)), _const(num_pages - 1))
            group = arith.remui(group, _const(layout.groups))
            at = [_index(x) for x in (page, head, group, channel)]
            words.append((is_one, memref.load(codes, at)))
        step = middle = zero
        for is_one, word in words:
            low = arith.bitcast(f32, arith.shli(word, _const(16)))
            wide = arith.bitcast(f32, arith.andi(word, _const(0xFFFF0000)))
            centre = arith.addf(low, arith.mulf(wide, arith.constant(f32, half)))
            step = arith.addf(step, arith.select(is_one, wide, zero))
            middle = arith.addf(middle, arith.select(is_one, centre, zero))
        middle = arith.divf(middle, arith.uitofp(f32, divisor))
        return [_of_thread(x, result) for x in (step, middle)]

    values = (plgpu.layout_cast(jnp.full((128,), x), by_thread) for x in place)
    return sample(*refs, *values)


def _of_thread(value, result):
    """The array of which every thread has one value."""
    layout = result.layout.to_mgpu()
    registers = np.empty(layout.registers_shape(result.shape), object)
    one = ir.VectorType.get((1,), value.type)
    registers.flat[0] = vector.broadcast(one, value)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def keep_channels(refs, weight, queries, middles, by_channel, columns, interpret):
    """Writes the 16 channels of the largest weights, and what the heads have there.

    Args:
      refs: weights float32 [D], channels int32 [16], queries bfloat16 [8, 16] and
        middles float32 [16, columns]; the weights are there already.
      weight: float32 [D], the same; equal ones go by the lowest channel.
      queries: float32 [D], of every query head.
      middles: like queries: logits of the middle of a channel.
      by_channel: layout of [D].
      columns: query heads, filled up with zeros.
      interpret: run on whole arrays.
    """
    size = weight.shape[0]
    if interpret:
        _, channels_s, queries_s, middles_s = refs
        kept = lax.top_k(weight, CHANNELS)[1]
        channels_s[...] = kept
        missing = ((0, columns - len(queries)), (0, 0))
        taken = (
            jnp.pad(jnp.stack([x[kept] for x in values]), missing)
            for values in (queries, middles)
        )
        queries, middles = taken
        behind = ((0, queries_s.shape[0] - columns), (0, 0))
        queries_s[...] = jnp.pad(queries, behind).astype(jnp.bfloat16)
        middles_s[...] = middles.T
        return

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 4, *[by_channel] * (1 + 2 * len(queries)))
    )
    def keep(ctx, weights_s, channels_s, queries_s, middles_s, weight, *values):
        del ctx
        (weight,) = _values(weight)
        channel = arith.andi(mgpu.thread_idx(), _const(size - 1))
        bf16, f32 = ir.BF16Type.get(), ir.F32Type.get()
        zero, at = arith.constant(f32, 0.0), _const(0)
        for other in range(size):
            theirs = memref.load(weights_s, [_index(_const(other))])
            is_larger = arith.cmpf(arith.CmpFPredicate.OGT, theirs, weight)
            is_equal = arith.cmpf(arith.CmpFPredicate.OEQ, theirs, weight)
            is_lower = arith.cmpi(arith.CmpIPredicate.ult, _const(other), channel)
            is_before = arith.ori(is_larger, arith.andi(is_equal, is_lower))
            at = arith.addi(at, arith.extui(at.type, is_before))

        def write():
            memref.store(channel, channels_s, [_index(at)])
            for i in range(columns):
                head = _index(_const(i))
                q = middle = zero
                if i < len(queries):
                    (q,) = _values(values[i])
                    (middle,) = _values(values[len(queries) + i])
                memref.store(arith.truncf(bf16, q), queries_s, [head, _index(at)])
                memref.store(middle, middles_s, [_index(at), head])

        _if(arith.cmpi(arith.CmpIPredicate.ult, at, _const(CHANNELS)), write)

    keep(*refs, weight, *queries, *middles)


def write_column_sums(sums, values, layout, interpret):
    """Writes sums over the keys of every warp, float32 [4, columns]."""
    if interpret:
        sums[0] = values.sum(0)
        for warp in range(1, 4):
            sums[warp] = jnp.zeros(values.shape[1], jnp.float32)
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), layout))
    def write(ctx, sums, values):
        del ctx
        columns = values.shape[1]
        held = _values(values)
        totals = [held[0], held[1]]
        for i, value in enumerate(held[2:]):
            totals[i % 2] = arith.addf(totals[i % 2], value)
        distance = columns // 2  # lanes that hold other columns
        while distance < 32:
            totals = [
                arith.addf(x, utils.shfl_bfly(x, _const(distance))) for x in totals
            ]
            distance *= 2
        thread = mgpu.thread_idx()
        lane = arith.andi(thread, _const(31))
        warp = arith.andi(arith.shrui(thread, _const(5)), _const(3))

        def store():
            first = arith.shli(lane, _const(1))
            for i, total in enumerate(totals):
                column = arith.addi(first, _const(i))
                memref.store(total, sums, [_index(warp), _index(column)])

        is_one = arith.cmpi(arith.CmpIPredicate.ult, lane, _const(columns // 2))
        _if(is_one, store)

    write(sums, values)


def note_ranks(spec: TileSpec, refs, terms, inverse, place, layouts, interpret):
    """Ranks the keys of a tile by the mean of their shares, and counts the ranks.

    Args:
      spec: of the tile.
      refs: ranks int16 [rows, 8] of all keys, counts int32 [threads, n].
      terms: float32 [keys, columns], of the softmax of every head.
      inverse: float32 [columns], what makes them shares of the mean.
      place: tile, first recent position and length, int32.
      layouts: of terms, of inverse, and of an array with one value per thread.
      interpret: run on whole arrays.
    """
    if interpret:
        _note_ranks_of_arrays(spec, refs, terms, inverse, *place)
        return
    of_terms, by_column, by_thread = layouts

    @plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 2, of_terms, by_column, *[by_thread] * 3)
    )
    def note(ctx, ranks_s, counts_s, terms, inverse, *place):
        del ctx
        tile, recent, length = (_values(x)[0] for x in place)
        factors, held = _values(inverse), _values(terms)
        scores = [
            arith.addf(arith.mulf(x, factors[0]), arith.mulf(y, factors[1]))
            for x, y in zip(held[::2], held[1::2], strict=True)
        ]
        copies = 4 // spec.sets  # lanes that have columns of the same keys
        copy = arith.andi(mgpu.thread_idx(), _const(copies - 1))
        first = arith.muli(tile, _const(spec.keys))
        first = arith.addi(first, key_of_register(spec, copy))
        counts = llvm.ptrtoint(copy.type, utils.memref_ptr(counts_s))  # in bytes
        for i, score in enumerate(_sums_by_lane(scores, copies)):
            key = arith.addi(
                first, _const(i * copies * spec.sets * spec.codes.block_words)
            )
            rank = arith.shrui(arith.bitcast(copy.type, score), _const(RANK_SHIFT))
            rank = arith.subi(rank, _const(LOWEST_RANK))
            rank = arith.maxsi(rank, _const(0))
            rank = arith.minsi(rank, _const(RECENT_RANK - 1))
            is_recent = arith.cmpi(arith.CmpIPredicate.sge, key, recent)
            rank = arith.select(is_recent, _const(RECENT_RANK), rank)

            def write(key=key, rank=rank):
                small = arith.trunci(ir.IntegerType.get_signless(16), rank)
                at = arith.shrui(key, _const(3)), arith.andi(key, _const(7))
                memref.store(small, ranks_s, [_index(x) for x in at])
                at = arith.addi(counts, arith.shli(rank, _const(2)))
                # Relaxed: a memref's own atomic addition would wait for the device.
                utils.inline_ptx("red.relaxed.cta.shared.add.u32 [$0], 1;", at)

            _if(arith.cmpi(arith.CmpIPredicate.slt, key, length), write)

    values = (plgpu.layout_cast(jnp.full((128,), x), by_thread) for x in place)
    note(*refs, terms, inverse, *values)


def _sums_by_lane(values, copies):
    """Sums over `copies` neighbouring lanes, of which lane i has every i-th one."""
    distance = 1
    while distance < copies:
        lane = arith.shrui(mgpu.thread_idx(), _const(distance.bit_length() - 1))
        is_odd = arith.trunci(ir.IntegerType.get_signless(1), lane)
        halved = []
        for even, odd in zip(values[::2], values[1::2], strict=True):
            mine = arith.select(is_odd, odd, even)
            theirs = arith.select(is_odd, even, odd)
            received = utils.shfl_bfly(theirs, _const(distance))
            halved.append(arith.addf(mine, received))
        values, distance = halved, 2 * distance
    return values


def _note_ranks_of_arrays(spec, refs, terms, inverse, tile, recent, length):
    ranks_s, counts_s = refs
    rows = spec.keys // ranks_s.shape[1]
    position = tile * spec.keys + jnp.arange(spec.keys)
    ranks = ranks_of((terms * inverse).sum(1))
    ranks = jnp.where(position >= recent, RECENT_RANK, ranks)
    is_used = position < length

    @pl.when(is_used.any())
    def _note():
        place = pl.ds(tile * rows, rows)
        ranks_s[place] = ranks.astype(jnp.int16).reshape(rows, -1)
        counts = counts_s[...]
        where = jnp.where(is_used, ranks, counts.size)
        counted = counts.reshape(-1).at[where].add(1, mode="drop")
        counts_s[...] = counted.reshape(counts.shape)


def find_rank(found, counts, above, wanted, layouts, interpret):
    """Writes the largest rank that `wanted` keys reach, and how many are above it.

    Nothing is written if no key is wanted.

    Args:
      found: int32 [2].
      counts: int32 [threads, n]: of every rank, in its order.
      above: int32 [threads]: keys with a rank of a later thread.
      wanted: int32 [threads], the same for all; at most as many as there are keys.
      layouts: of counts, and of one value per thread.
      interpret: run on whole arrays.
    """
    if interpret:
        reached = above[:, None] + jnp.cumsum(counts[:, ::-1], 1)[:, ::-1]
        before = reached - counts
        is_it = (before < wanted[:, None]) & (reached >= wanted[:, None])
        rank = jnp.arange(counts.size).reshape(counts.shape)

        @pl.when(is_it.any())
        def _write():
            found[0] = jnp.where(is_it, rank, 0).sum()
            found[1] = jnp.where(is_it, before, 0).sum()

        return
    rows, by_thread = layouts

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), rows, by_thread, by_thread))
    def find(ctx, found, counts, above, wanted):
        del ctx
        (before,), (wanted,) = _values(above), _values(wanted)
        held = _values(counts)
        thread = arith.andi(mgpu.thread_idx(), _const(127))
        first = arith.muli(thread, _const(len(held)))
        for i, count in reversed(list(enumerate(held))):
            reached = arith.addi(before, count)
            is_it = arith.andi(
                arith.cmpi(arith.CmpIPredicate.slt, before, wanted),
                arith.cmpi(arith.CmpIPredicate.sge, reached, wanted),
            )

            def write(i=i, before=before):
                rank = arith.addi(first, _const(i))
                memref.store(rank, found, [_index(_const(0))])
                memref.store(before, found, [_index(_const(1))])

            _if(is_it, write)
            before = reached

    find(found, counts, above, wanted)

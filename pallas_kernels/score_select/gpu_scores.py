"""Logits of keys by their codes, by single threads of a Hopper GPU.

A call scores 32 words of each of 16 channels: 256 keys in 4 bits, 512 in 2. Lane
4 r + c of a warp takes word r of the channels 2c, 2c + 1, 8 + 2c and 9 + 2c. It widens
one field of two words at a time to a pair of bfloat16, and pairs are what the matrix
unit wants of a lane: rows r and r + 8 of a product of 16 keys by 16 channels.

With at most 4 query heads half of its 8 columns would be idle. There a product takes 8
channels of two sets of 16 keys side by side, and the columns 4..7 are the same heads
for the second set:

    keys    16 x [ channels 0..7 of set 0 | channels 0..7 of set 1 ]
    queries      [ heads 0..3 | 0         ]
                 [ 0          | heads 0..3 ]
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src.lib.mlir import ir
from jax._src.lib.mlir.dialects import arith, memref, scf, vector
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu_counting import element
from pallas_kernels.score_select.codes import CodeLayout, decode

_WARPS = 4
_LANES_OF_WORDS = 8  # of a warp: each takes a word of the same channels
CHANNELS = 16  # of one product
_MANTISSA = 7  # bits of a bfloat16
_POWERS_OF_2 = {2: 0x4080, 4: 0x4180}  # 2**bits in bfloat16
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class TileSpec:
    """What one call scores."""

    codes: CodeLayout
    group_size: int  # query heads of a KV head

    @property
    def columns(self):
        """Query heads, filled up."""
        return 4 if self.group_size <= 4 else 8

    @property
    def sets(self):
        """Keys side by side in one product."""
        return 8 // self.columns

    @property
    def words(self):
        """Words of a channel."""
        return _WARPS * _LANES_OF_WORDS

    @property
    def keys(self):
        """Keys of a call."""
        return self.words * self.codes.fields

    @functools.cached_property
    def layout(self):
        """Layout of logits [keys, columns]: who has what after the products."""
        block, fields, sets = self.codes.block_words, self.codes.fields, self.sets
        columns = self.columns
        warp = _LANES_OF_WORDS * fields
        tiles = (
            (_WARPS * warp, columns),
            (warp, columns),
            (block * fields, columns),
            (sets * block, columns),
            (block, columns),
            (2,),
        )
        # From the end: 2 columns, pairs of columns, words, sets, fields, blocks, warps.
        # Each tile leaves two dimensions, the last one leaves one.
        layout = fa.TiledLayout(
            fa.Tiling(tiles),
            warp_dims=(-11,),
            lane_dims=(-9, -3, -5, -2),
            vector_dim=-1,
            _check_canonical=False,
        ).canonicalize()
        return plgpu.Layout.TILED(
            plgpu.Tiling(layout.tiling.tiles),
            warp_dims=layout.warp_dims,
            lane_dims=layout.lane_dims,
            vector_dim=layout.vector_dim,
        )


def score_tile(spec: TileSpec, refs, place, by_thread, interpret):
    """Returns logits float32 [keys, columns] of a tile of keys, without a scale.

    Those past the length are very small.

    Args:
      spec: sizes.
      refs: codes [P, H, groups, row], table [lanes, W], channels int32 [16], queries
        bfloat16 [8, 16], zero behind the last head.
      place: lane, head, tile and length, int32.
      by_thread: layout of an array with one value per thread.
      interpret: run on whole arrays.
    """
    if interpret:
        return _score_tile_of_arrays(spec, *refs, *place)
    shape = spec.keys, spec.columns
    score = plgpu.inline_mgpu(
        arg_types=(*[plgpu.RefType()] * 4, *[by_thread] * 4),
        return_type=plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=spec.layout),
    )(functools.partial(_score, spec))
    values = (plgpu.layout_cast(jnp.full((128,), x), by_thread) for x in place)
    return score(*refs, *values)


def _score_tile_of_arrays(spec, codes_ref, table_ref, channels_s, queries_s, *place):
    lane, head, tile, length = place
    codes = spec.codes
    num_pages, width = codes_ref.shape[0], table_ref.shape[1]
    channels = channels_s[...]
    queries = queries_s[: spec.columns].astype(jnp.float32)
    in_tile = spec.keys // codes.group

    def score(i, logits):
        group = tile * in_tile + i
        column = jnp.minimum(lax.div(group, codes.groups), width - 1)
        page = jnp.clip(table_ref[lane, column], 0, num_pages - 1)
        row = codes_ref[page, head, lax.rem(group, codes.groups)]
        keys = jnp.take(decode(row, codes), channels, axis=1).astype(jnp.float32)
        products = jnp.dot(keys, queries.T, precision=lax.Precision.HIGHEST)
        return lax.dynamic_update_slice(logits, products, (i * codes.group, 0))

    logits = jnp.zeros((spec.keys, spec.columns), jnp.float32)
    logits = lax.fori_loop(0, in_tile, score, logits)
    position = tile * spec.keys + jnp.arange(spec.keys)[:, None]
    return jnp.where(position < length, logits, _MASKED)


def _score(spec: TileSpec, ctx, codes, table, channels, queries, *place):
    """Device code of `score_tile`: one thread's part."""
    del ctx
    thread = _Thread(spec, *(element(x.registers.flat[0], 0) for x in place))
    words = thread.load(codes, table, channels)
    fields = [thread.widen(words, pair) for pair in range(2)]
    factors = thread.load_queries(queries)
    f32 = ir.F32Type.get()
    zero = arith.constant(f32, 0.0)
    made = []
    count = spec.codes.fields
    if spec.sets == 1:
        for i in range(0, count, 2):
            keys = fields[0][i], fields[0][i + 1], fields[1][i], fields[1][i + 1]
            made += _multiply(keys, factors[0], [zero] * 4)
    else:
        for i in range(0, count, 4):
            sums = [zero] * 4
            for pair in range(2):
                keys = [fields[pair][i + n] for n in (0, 2, 1, 3)]
                sums = _multiply(keys, factors[pair], sums)
            made += sums
    made = thread.mask(made)
    layout = spec.layout.to_mgpu()
    registers = np.empty(layout.registers_shape((spec.keys, spec.columns)), object)
    two = ir.VectorType.get((2,), f32)
    pairs = zip(made[::2], made[1::2], strict=True)
    for i, values in enumerate(pairs):
        registers.flat[i] = vector.from_elements(two, list(values))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


class _Thread:
    """What one thread loads and widens."""

    def __init__(self, spec: TileSpec, lane, head, tile, length):
        self.spec, self.codes = spec, spec.codes
        self.lane, self.head, self.length = lane, head, length
        i32 = self.i32 = ir.IntegerType.get_signless(32)
        thread = mgpu.thread_idx()
        in_warp = arith.andi(thread, mgpu.c(31, i32))
        warp = arith.andi(arith.shrui(thread, mgpu.c(5, i32)), mgpu.c(_WARPS - 1, i32))
        self.row = arith.shrui(in_warp, mgpu.c(2, i32))
        self.column = arith.andi(in_warp, mgpu.c(3, i32))
        word = arith.addi(arith.muli(warp, mgpu.c(_LANES_OF_WORDS, i32)), self.row)
        first = arith.muli(tile, mgpu.c(spec.words, i32))
        self.word = arith.addi(first, word)
        self.first = arith.muli(tile, mgpu.c(spec.keys, i32))

    def const(self, value):
        """An int32."""
        return mgpu.c(value, self.i32)

    def load(self, codes, table, channels):
        """(words, ranges) of the lane's four channels."""
        num_pages = ir.MemRefType(codes.type).shape[0]
        width = ir.MemRefType(table.type).shape[1]
        of_page = self.codes.groups * self.codes.words
        column = arith.divui(self.word, self.const(of_page))
        column = arith.minui(column, self.const(width - 1))
        page = memref.load(table, [_index(self.lane), _index(column)])
        page = arith.minsi(arith.maxsi(page, self.const(0)), self.const(num_pages - 1))
        rest = arith.remui(self.word, self.const(of_page))
        group = arith.divui(rest, self.const(self.codes.words))
        word = arith.remui(rest, self.const(self.codes.words))
        at = [_index(x) for x in (page, self.head, group)]
        words, ranges = [], []
        for number in (0, 1, 8, 9):
            place = arith.addi(self._twice_column(), self.const(number))
            channel = memref.load(channels, [_index(place)])
            ranges.append(memref.load(codes, [*at, _index(channel)]))
            offset = arith.muli(channel, self.const(self.codes.words))
            offset = arith.addi(offset, self.const(self.codes.head_size))
            offset = arith.addi(offset, word)
            words.append(memref.load(codes, [*at, _index(offset)]))
        return words, ranges

    def _twice_column(self):
        return arith.shli(self.column, self.const(1))

    def widen(self, loaded, pair):
        """Keys of every field, two channels side by side, bfloat16 in 32 bits."""
        (first, second), (low, high) = ((x[2 * pair : 2 * pair + 2]) for x in loaded)
        bases, steps = _halves(low, high, 0), _halves(low, high, 1)
        bits, made = self.codes.bits, []
        # A level is as many highest bits of the mantissa of 2**bits + level.
        below = _MANTISSA - bits
        mask, one = (self.codes.levels - 1) << below, _POWERS_OF_2[bits]
        mask, one = (self.const(x << 16 | x) for x in (mask, one))
        for field in range(self.codes.fields):
            half, place = divmod(field, 16 // bits)
            words, shift = _halves(first, second, half), bits * place - below
            if shift > 0:
                words = arith.shrui(words, self.const(shift))
            elif shift < 0:
                words = arith.shli(words, self.const(-shift))
            level = arith.ori(arith.andi(words, mask), one)
            made.append(
                utils.inline_ptx(
                    "fma.rn.bf16x2 $0, $1, $2, $3;",
                    level,
                    steps,
                    bases,
                    result_types=self.i32,
                )
            )
        return made

    def mask(self, logits):
        """Logits with those of keys past the length very small, in the last tile."""
        end = arith.addi(self.first, self.const(self.spec.keys))
        is_edge = arith.cmpi(arith.CmpIPredicate.ugt, end, self.length)
        branch = scf.IfOp(is_edge, [x.type for x in logits], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            small, masked = arith.constant(ir.F32Type.get(), _MASKED), []
            for i in range(0, len(logits), 2):
                key = arith.addi(self.first, key_of_register(self.spec, i // 2))
                is_used = arith.cmpi(arith.CmpIPredicate.ult, key, self.length)
                pair = logits[i : i + 2]
                masked += [arith.select(is_used, x, small) for x in pair]
            scf.yield_(masked)
        with ir.InsertionPoint(branch.else_block):
            scf.yield_(logits)
        return list(branch.results)

    def load_queries(self, queries):
        """What the matrix unit wants of the queries: two registers of each product."""
        head = arith.andi(self.row, self.const(self.spec.columns - 1))
        found = []
        for number in (0, 8):
            place = arith.addi(self._twice_column(), self.const(number))
            behind = arith.addi(place, self.const(1))
            values = [
                memref.load(queries, [_index(head), _index(x)]) for x in (place, behind)
            ]
            pair = vector.from_elements(
                ir.VectorType.get((2,), ir.BF16Type.get()), values
            )
            one = ir.VectorType.get((1,), self.i32)
            found.append(element(vector.bitcast(one, pair), 0))
        if self.spec.sets == 1:
            return [found]
        is_second = arith.cmpi(
            arith.CmpIPredicate.uge, self.row, self.const(self.spec.columns)
        )
        zero = self.const(0)
        return [
            [arith.select(is_second, zero, x), arith.select(is_second, x, zero)]
            for x in found
        ]


def key_of_register(spec: TileSpec, number):
    """Which of a tile's keys a thread has in a register of the logits."""
    i32 = ir.IntegerType.get_signless(32)
    const = functools.partial(mgpu.c, ty=i32)
    thread = mgpu.thread_idx()
    warp = arith.andi(arith.shrui(thread, const(5)), const(_WARPS - 1))
    row = arith.andi(arith.shrui(thread, const(2)), const(_LANES_OF_WORDS - 1))
    block, fields = spec.codes.block_words, spec.codes.fields
    key = arith.muli(warp, const(_LANES_OF_WORDS * fields))
    in_blocks = arith.muli(arith.divui(row, const(block)), const(block * fields))
    key = arith.addi(key, arith.addi(in_blocks, arith.remui(row, const(block))))
    if spec.sets == 2:  # the lanes of the upper columns have the second set
        is_second = arith.andi(arith.shrui(thread, const(1)), const(1))
        key = arith.addi(key, arith.muli(is_second, const(block)))
    if isinstance(number, int):
        number = const(number)
    return arith.addi(key, arith.muli(number, const(spec.sets * block)))


def _index(value):
    return arith.index_cast(ir.IndexType.get(), value)


def _halves(first, second, half):
    """The low or the high halves of two words, side by side."""
    return utils.inline_ptx(
        f"prmt.b32 $0, $1, $2, {('0x5410', '0x7632')[half]};",
        first,
        second,
        result_types=ir.IntegerType.get_signless(32),
    )


def _multiply(keys, queries, sums):
    """`sums` and the product of 16 keys by 16 channels with 8 columns of queries."""
    f32 = ir.F32Type.get()
    return list(
        utils.inline_ptx(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            *keys,
            *queries,
            *sums,
            result_types=[f32] * 4,
            convergent=True,
        )
    )

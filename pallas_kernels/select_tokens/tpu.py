"""Exact token selection for TPU (Pallas Mosaic TPU), without sort or scatter.

A grid step handles one lane, in three phases:

1. scores become int32 keys of the same order; recents the largest key, positions
   past the length the smallest;
2. bisection on the 32 bits of the keys finds, for all heads at once, the key of the
   last place: the largest threshold that at least `count` keys reach;
3. per head, prefix sums by triangular matrices number the chosen positions, and each
   group of 128 places finds its positions: first the block of 128 candidates that
   holds a place (a one-hot matrix [blocks, places]), then the position inside the
   block, the number of chosen ones up to each position compared with the place.

Every number in a matrix product is an integer of at most 128, exact in bfloat16.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.array_types import PerLane, Scores
from pallas_kernels.select_tokens.api import SelectedTokens
from pallas_kernels.select_tokens.reference import ordered_keys

_LANES = 128
_UNROLLED_BLOCKS = 8  # candidates are padded to 8 blocks of 128
_MAX_CANDIDATES = 131072  # the triangular matrix over blocks grows with the square
_VMEM_BYTES = 44 << 20
_INT32_MIN = jnp.iinfo(jnp.int32).min
_INT32_MAX = jnp.iinfo(jnp.int32).max


def select_tokens_tpu(
    scores: Scores,
    lengths: PerLane,
    budgets: PerLane,
    *,
    cap: int,
    num_recent: int,
    per_layer: bool,
    interpret: bool | pltpu.InterpretParams = False,
) -> SelectedTokens:
    """Returns what `api.select_tokens` documents.

    Raises:
      NotImplementedError: more than 131072 candidates, or scores of a lane that
        need more VMEM than there is.
    """
    lanes, num_heads, num_candidates = scores.shape
    if num_candidates > _MAX_CANDIDATES:
        raise NotImplementedError(
            f"scores has {num_candidates} candidates, the TPU kernel takes at most "
            f"{_MAX_CANDIDATES}; use impl='reference'"
        )
    # Columns past the table are never candidates, whatever the padding holds.
    unit = _UNROLLED_BLOCKS * _LANES
    scores = jnp.pad(scores, ((0, 0), (0, 0), (0, -num_candidates % unit)))
    num_blocks = scores.shape[2] // _LANES
    rows = 1 if per_layer else num_heads
    cap_columns = -(-cap // _LANES) * _LANES
    counts = jnp.minimum(jnp.minimum(budgets, lengths), cap)
    vmem_bytes = _vmem_bytes(num_blocks, num_heads, rows, cap_columns)
    if vmem_bytes > _VMEM_BYTES:
        raise NotImplementedError(
            f"scores has {num_heads} heads of {num_candidates} candidates: a lane "
            f"needs {vmem_bytes} bytes of VMEM, the kernel has {_VMEM_BYTES}; use "
            "per_layer=True on averaged scores, or impl='reference'"
        )
    indices = pl.pallas_call(
        functools.partial(_kernel, num_recent=num_recent, per_layer=per_layer),
        out_shape=jax.ShapeDtypeStruct((lanes, num_heads, cap_columns), jnp.int32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(lanes,),
            in_specs=[
                pl.BlockSpec((1, *scores.shape[1:]), lambda i, *_: (i, 0, 0)),
            ],
            out_specs=pl.BlockSpec(
                (1, num_heads, cap_columns), lambda i, *_: (i, 0, 0)
            ),
            scratch_shapes=[
                pltpu.VMEM((num_blocks, rows, _LANES), jnp.int32),
                pltpu.VMEM((rows, _LANES), jnp.int32),
                pltpu.VMEM((num_blocks, num_blocks), jnp.bfloat16),
                pltpu.VMEM((num_blocks, _LANES), jnp.float32),
                pltpu.VMEM((num_blocks, _LANES), jnp.float32),
                pltpu.VMEM((num_blocks, _LANES), jnp.bfloat16),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",),
            vmem_limit_bytes=vmem_bytes + (16 << 20),
        ),
        interpret=interpret,
        name="select_tokens",
    )(lengths, counts, scores)
    counts = jnp.broadcast_to(counts[:, None], (lanes, num_heads))
    return SelectedTokens(indices[:, :, :cap], counts)


def _vmem_bytes(num_blocks: int, num_heads: int, rows: int, cap_columns: int) -> int:
    """Returns bytes of scratch, and of inputs and outputs twice."""
    columns = num_blocks * _LANES
    heads, rows = (-(-n // 8) * 8 for n in (num_heads, rows))
    blocks = num_blocks * (2 * max(num_blocks, _LANES) + 10 * _LANES)
    return columns * (2 * heads + rows) * 4 + 2 * heads * cap_columns * 4 + blocks


def _kernel(
    lengths_ref,  # int32 [lanes], SMEM
    counts_ref,  # int32 [lanes], SMEM
    scores_ref,  # float32 [1, H, blocks * 128]
    out_ref,  # int32 [1, H, cap_columns]
    keys_ref,  # int32 [blocks, rows, 128]; rows = H, or 1 for a whole layer
    threshold_ref,  # int32 [rows, 128], equal in all lanes
    below_ref,  # bfloat16 [blocks, blocks], strictly lower triangular ones
    first_ref,  # float32 [blocks, 128], places taken before a block
    end_ref,  # float32 [blocks, 128], places taken up to its end
    prefix_ref,  # bfloat16 [blocks, 128], taken inside the block up to a position
    *,
    num_recent,
    per_layer,
):
    lane = pl.program_id(0)
    length, count = lengths_ref[lane], counts_ref[lane]
    num_blocks = keys_ref.shape[0]
    used_blocks = pl.cdiv(length, _LANES)
    first_recent = length - jnp.minimum(num_recent, count)

    def write_keys(b, _):
        start = pl.multiple_of(b * _LANES, _LANES)
        keys_ref[b] = _block_keys(
            scores_ref[0, :, pl.ds(start, _LANES)],
            start,
            length,
            first_recent,
            per_layer,
        )

    jax.lax.fori_loop(0, num_blocks, write_keys, None)
    _fill_strictly_lower(below_ref)
    threshold_ref[...] = _last_place(keys_ref, count, used_blocks)
    out_ref[...] = jnp.zeros_like(out_ref)

    def emit_head(j, _):
        _number_places(
            keys_ref[:, j],
            threshold_ref[pl.ds(j, 1)],
            count,
            below_ref[...],
            first_ref,
            end_ref,
            prefix_ref,
        )

        def emit(c, _):
            start = pl.multiple_of(c * _LANES, _LANES)
            row = _positions(start, count, first_ref, end_ref, prefix_ref)
            tile = (0, slice(None), pl.ds(start, _LANES))
            # A store of one row cannot be dynamic along both axes of a tile.
            head = jax.lax.broadcasted_iota(jnp.int32, out_ref[tile].shape, 0)
            out_ref[tile] = jnp.where(per_layer | (head == j), row, out_ref[tile])

        jax.lax.fori_loop(0, pl.cdiv(count, _LANES), emit, None)

    jax.lax.fori_loop(0, keys_ref.shape[1], emit_head, None)


def _fill_strictly_lower(ref):
    """Writes 1 where column < row, by strips of rows."""
    size = ref.shape[0]
    strip = next(n for n in (128, 64, 32, 16, 8) if size % n == 0)

    def fill(i, _):
        start = pl.multiple_of(i * strip, strip)
        row = start + jax.lax.broadcasted_iota(jnp.int32, (strip, size), 0)
        column = jax.lax.broadcasted_iota(jnp.int32, (strip, size), 1)
        ones = jnp.where(column < row, 1.0, 0.0)
        ref[pl.ds(start, strip)] = ones.astype(ref.dtype)

    jax.lax.fori_loop(0, size // strip, fill, None)


def _block_keys(scores, start, length, first_recent, per_layer):
    """Returns int32 keys [rows, 128] of one block of scores [H, 128]."""
    if per_layer:  # in head order, as the reference adds
        total = scores[:1]
        for j in range(1, scores.shape[0]):
            total = total + scores[j : j + 1]
        scores = total
    position = start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    keys = jnp.where(position >= first_recent, _INT32_MAX, ordered_keys(scores))
    return jnp.where(position < length, keys, _INT32_MIN)


def _last_place(keys_ref, count, used_blocks):
    """Returns int32 [rows, 128]: the largest key that at least `count` keys reach."""
    rows, strip = keys_ref.shape[1], _UNROLLED_BLOCKS

    def bit(i, threshold):  # in unsigned order: the sign bit is flipped
        raised = threshold | jnp.left_shift(jnp.int32(1), 31 - i)
        limit = raised ^ _INT32_MIN

        def add(b, total):
            keys = keys_ref[pl.ds(b * strip, strip)]
            return total + jnp.sum(jnp.where(keys >= limit[None], 1.0, 0.0), axis=0)

        zeros = jnp.zeros((rows, _LANES), jnp.float32)
        total = jax.lax.fori_loop(0, pl.cdiv(used_blocks, strip), add, zeros)
        reached = jnp.sum(total, axis=1, keepdims=True) >= count.astype(jnp.float32)
        return jnp.where(reached, raised, threshold)

    zeros = jnp.zeros((rows, _LANES), jnp.int32)
    return jax.lax.fori_loop(0, 32, bit, zeros) ^ _INT32_MIN


def _number_places(keys, threshold, count, below, first_ref, end_ref, prefix_ref):
    """Numbers the chosen positions of one head in ascending order.

    All keys above the threshold are chosen, and of those equal to it the first ones,
    until `count` are.
    """
    shape = (_LANES, _LANES)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    up_to = jnp.where(row <= column, 1.0, 0.0).astype(jnp.bfloat16)
    ones = jnp.ones(shape, jnp.bfloat16)

    def counts(chosen):
        """Of each position: within its block so far, in the block, before it."""
        chosen = jnp.where(chosen, 1.0, 0.0).astype(jnp.bfloat16)
        within = _dot(chosen, up_to)
        total = _dot(chosen, ones)
        return within, total, _dot(below, total.astype(jnp.bfloat16))

    above, above_total, above_before = counts(keys > threshold)
    equal, equal_total, equal_before = counts(keys == threshold)
    num_above = jnp.max(above_before + above_total)
    places = count.astype(jnp.float32) - num_above  # left for equal keys
    taken_before = jnp.minimum(equal_before, places)
    first_ref[...] = above_before + taken_before
    taken = jnp.minimum(equal_before + equal_total, places)
    end_ref[...] = above_before + above_total + taken
    taken = jnp.minimum(equal_before + equal, places) - taken_before
    prefix_ref[...] = (above + taken).astype(jnp.bfloat16)


def _positions(start, count, first_ref, end_ref, prefix_ref):
    """Returns int32 [1, 128]: positions of the places start .. start + 127."""
    first = first_ref[...]
    place = start + jax.lax.broadcasted_iota(jnp.int32, first.shape, 1)
    place = place.astype(jnp.float32)
    holds = jnp.where((first <= place) & (place < end_ref[...]), 1.0, 0.0)
    # Of the one block that holds a place: [position in the block, place].
    prefix = jax.lax.dot_general(
        prefix_ref[...],
        holds.astype(jnp.bfloat16),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    block = jax.lax.broadcasted_iota(jnp.int32, first.shape, 0).astype(jnp.float32)
    block_start = jnp.sum(holds * block, axis=0, keepdims=True) * _LANES
    rank = place[:1] - jnp.sum(holds * first, axis=0, keepdims=True)
    offset = jnp.sum(jnp.where(prefix <= rank, 1.0, 0.0), axis=0, keepdims=True)
    position = (block_start + offset).astype(jnp.int32)
    return jnp.where(place[:1] < count.astype(jnp.float32), position, 0)


def _dot(a, b):
    return jax.lax.dot(a, b, preferred_element_type=jnp.float32)

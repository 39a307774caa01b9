"""The mass of paged attention on Hopper GPUs: how it is stored and summed.

The probabilities of a row and a block of 64 keys are stored as whole numbers of
`mass_bits` bits, relative to the largest of them. Those of keys c, 8 + c, 16 + c, ...
lie behind each other in two to four 32-bit words, for every c below 8.
"""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.common import MASK_VALUE
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    GROUP,
    MASS_BLOCKS,
    WARPS,
    Spec,
    full,
    parts_of,
)

_WORD = 32
_PARTS = 2  # whose log sums are in flight, which take registers
_ROUNDER = 2.0**23  # a float32 between it and twice it has no fraction


# A warp holds four blocks; a thread one column of all rows, which it sums by itself.
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(
        ((MASS_BLOCKS, GROUP, GROUP), (MASS_BLOCKS // WARPS, GROUP, GROUP), (1,))
    ),
    warp_dims=(-7,),
    lane_dims=(-4, -2),
    vector_dim=-1,
)
_KEYS = _LAYOUT.reduce(1)


def pack(levels, bits: int) -> list:
    """Returns the words, each int32 [rows, GROUP], of numbers below 2 ** bits.

    Args:
      levels: float32 [rows, BLOCK], at most 2 ** bits - 1; rounded here.
      bits: 8, 12 or 16.
    """
    numbers = lax.bitcast_convert_type(levels + _ROUNDER, jnp.int32)
    numbers &= (1 << bits) - 1
    groups = [numbers[:, i : i + GROUP] for i in range(0, BLOCK, GROUP)]
    words = []
    for low in range(0, bits * len(groups), _WORD):
        word = None
        for i, group in enumerate(groups):
            shift = i * bits - low
            if -bits < shift < _WORD:
                part = group << shift if shift >= 0 else group >> -shift
                word = part if word is None else word | part
        words.append(word)
    return words


def unpack(words: list, bits: int) -> list:
    """Returns the numbers, int32, of all groups: the inverse of `pack`."""
    groups = []
    for low in range(0, _WORD * len(words), bits):
        number = lax.shift_right_logical(words[low // _WORD], low % _WORD)
        if low % _WORD + bits > _WORD:
            number |= words[low // _WORD + 1] << (_WORD - low % _WORD)
        groups.append(number & ((1 << bits) - 1))
    return groups


def write_mass(
    spec: Spec,
    lane,
    head,
    first_step,
    ends,
    kv_lengths,
    q_lengths,
    log_sums,
    probabilities,
    maxima,
    mass,
):
    """Writes the mass of every `mass_ctas`-th 16 blocks of one lane and KV head."""
    G, group = spec.group_size, spec.groups[spec.mass_group]
    is_edges = spec.mass_rows == "edges"
    tiles = 1 if is_edges else group.tiles_per_lane
    lane_index = group.first_lane + lane
    q_len = q_lengths[lane_index]
    base = kv_lengths[lane_index, head] - q_len
    used = jnp.minimum(q_len, 2 if is_edges else group.num_queries) * G
    levels = (1 << spec.config.mass_bits) - 1
    share = 1.0 / (jnp.maximum(used, 1) * levels).astype(jnp.float32)

    def add_tile(block, number, acc):
        segment = (lane * group.tiles_per_lane + number) * spec.num_heads + head
        rows = jnp.clip(used - number * group.step * G, 0, group.step * G)
        refs = (ends, log_sums, probabilities.at[segment], maxima.at[segment])
        return _add_tile(spec, spec.mass_segments[0] + segment, block, rows, *refs, acc)

    def step(i, _):
        block = i * MASS_BLOCKS
        add = functools.partial(_repeat, tiles, functools.partial(add_tile, block))
        shape = (MASS_BLOCKS, GROUP)
        acc = [full(shape, 0.0, _KEYS) for _ in range(BLOCK // GROUP)]
        acc = lax.cond(block * BLOCK < base, add, lambda acc: acc, acc)
        x = jnp.concatenate(acc, axis=1) * share
        key = BLOCK * (
            block + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_KEYS)
        )
        key += plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=_KEYS)
        mass[lane, head, pl.ds(block, MASS_BLOCKS)] = jnp.where(key < base, x, 0.0)

    num_steps = spec.mass_blocks // MASS_BLOCKS
    turns = lax.div(num_steps - 1 - first_step, spec.mass_ctas) + 1
    lax.fori_loop(0, turns, lambda i, _: step(first_step + i * spec.mass_ctas, _), None)


def _repeat(count: int, body, carry):
    """`lax.fori_loop` from 0, without a loop where it would have one turn."""
    return body(0, carry) if count == 1 else lax.fori_loop(0, count, body, carry)


def _add_tile(
    spec: Spec, segment, block, rows, ends, log_sums, probabilities, maxima, acc
):
    """Returns sums with those of the first `rows` rows of 16 blocks of a tile."""
    bits, count = spec.config.mass_bits, spec.mass_tile_rows
    by_row, blocks = _LAYOUT.reduce(2), pl.ds(block, MASS_BLOCKS)
    parts = parts_of(ends, segment, spec)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def add_rows(number, acc):
        wanted = number * GROUP
        # The last rows are read again where 8 more would be too many.
        first = jnp.maximum(jnp.minimum(wanted, count - GROUP), 0)
        # All loads stand in front: they wait for memory together.
        columns = range(0, spec.mass_words, GROUP)
        windows = [(blocks, pl.ds(first, GROUP), pl.ds(c, GROUP)) for c in columns]
        words = [load(probabilities.at[window], _LAYOUT) for window in windows]
        top = load(maxima.at[blocks, pl.ds(first, GROUP)], by_row)
        final = _final_log_sum(spec, segment, first, parts, log_sums)
        w = jnp.exp2(top - lax.broadcast_in_dim(final, top.shape, [1]))
        row = first + plgpu.broadcasted_iota(jnp.int32, w.shape, 1, layout=by_row)
        w = jnp.where((row >= wanted) & (row < rows), w, 0.0)
        w = lax.broadcast_in_dim(w, words[0].shape, [0, 1])
        pairs = zip(acc, unpack(words, bits), strict=True)
        return [a + (n.astype(jnp.float32) * w).sum(axis=1) for a, n in pairs]

    return _repeat(-(-count // GROUP), add_rows, acc)


def _final_log_sum(spec: Spec, segment, first, parts, log_sums):
    """Returns log sums over all parts of a segment, of eight rows from the first."""
    layout = _LAYOUT.reduce((0, 2))
    # Registers: where a loop adds several groups of rows, there are fewer to spare.
    at_once = _PARTS if spec.mass_tile_rows <= GROUP else 1
    first_part, last_part = parts

    def load(cta):
        part = segment + jnp.minimum(cta, last_part - 1)
        w = log_sums.at[part, pl.ds(first, GROUP)]
        w = plgpu.load(w, layout=layout, optimized=False)
        return w + jnp.where(cta < last_part, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        loaded = [load(first_part + i * at_once + k) for k in range(at_once)]
        return functools.reduce(_add_log, loaded, carry)

    zero = (full((GROUP,), 1.5 * MASK_VALUE, layout), full((GROUP,), 0.0, layout))
    steps = lax.div(last_part - first_part + (at_once - 1), at_once)
    m, total = lax.fori_loop(0, steps, add, zero)
    return m + jnp.log2(total)


def _add_log(carry, w):
    """Returns (maximum, sum relative to it) with one more logarithm."""
    m, total = carry
    m_new = jnp.maximum(m, w)
    return m_new, total * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)

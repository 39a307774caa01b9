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
from pallas_kernels.gpu_layouts import row_layout
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    GROUP,
    MASS_BLOCKS,
    TILE,
    WARPS,
    Spec,
    full,
)
from pallas_kernels.paged_attention.gpu_plan import part_index, parts_of

_WORD = 32
_PARTS = 4  # whose log sums are in flight
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
    plan,
    kv_lengths,
    q_lengths,
    log_sums,
    probabilities,
    maxima,
    mass,
    final_s,
):
    """Writes the mass of every `mass_ctas`-th 16 blocks of one lane and KV head.

    `final_s` is shared memory, float32 [1, 64].
    """
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
        index = spec.mass_segments[0] + segment
        first, last = parts_of(plan, index, spec)
        place = part_index(spec, index, first)
        _place_log_sums(final_s, log_sums, place, last - first)
        refs = probabilities.at[segment], maxima.at[segment], final_s
        return _add_tile(spec, block, rows, *refs, acc)

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


def _add_tile(spec: Spec, block, rows, probabilities, maxima, final_s, acc):
    """Returns sums with those of the first `rows` rows of 16 blocks of a tile."""
    bits, count = spec.config.mass_bits, spec.mass_tile_rows
    by_row, blocks = _LAYOUT.reduce(2), pl.ds(block, MASS_BLOCKS)

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_rows(number):
        """Returns words and maxima of 8 rows: all loads wait for memory together."""
        first = first_row(number)
        columns = range(0, spec.mass_words, GROUP)
        windows = [(blocks, pl.ds(first, GROUP), pl.ds(c, GROUP)) for c in columns]
        words = [load(probabilities.at[window], _LAYOUT) for window in windows]
        return words, load(maxima.at[blocks, pl.ds(first, GROUP)], by_row)

    def first_row(number):
        # The last rows are read again where 8 more would be too many.
        return jnp.maximum(jnp.minimum(number * GROUP, count - GROUP), 0)

    def add_rows(number, carry):
        acc, (words, top) = carry
        loaded = load_rows(number + 1) if turns > 1 else (words, top)
        first = first_row(number)
        final = load(final_s.at[0, pl.ds(first, GROUP)], _LAYOUT.reduce((0, 2)))
        w = jnp.exp2(top - lax.broadcast_in_dim(final, top.shape, [1]))
        row = first + plgpu.broadcasted_iota(jnp.int32, w.shape, 1, layout=by_row)
        w = jnp.where((row >= number * GROUP) & (row < rows), w, 0.0)
        w = lax.broadcast_in_dim(w, words[0].shape, [0, 1])
        pairs = zip(acc, unpack(words, bits), strict=True)
        acc = [a + (n.astype(jnp.float32) * w).sum(axis=1) for a, n in pairs]
        return acc, loaded

    turns = -(-count // GROUP)
    return _repeat(turns, add_rows, (acc, load_rows(0)))[0]


def _place_log_sums(final_s, log_sums, first, count):
    """Writes the log sums of 64 rows over `count` parts from the first to final_s."""
    layout = row_layout(TILE)

    def load(i):
        w = log_sums.at[pl.ds(first + jnp.minimum(i, count - 1), 1)]
        w = plgpu.load(w, layout=layout, optimized=False)
        return w + jnp.where(i < count, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        loaded = [load(i * _PARTS + k) for k in range(_PARTS)]
        return functools.reduce(_add_log, loaded, carry)

    zero = full((1, TILE), 1.5 * MASK_VALUE, layout), full((1, TILE), 0.0, layout)
    steps = lax.div(count + (_PARTS - 1), _PARTS)
    m, total = lax.fori_loop(0, steps, add, zero)
    plgpu.commit_smem()  # the sums before have been read
    final_s[...] = m + jnp.log2(total)
    plgpu.commit_smem()


def _add_log(carry, w):
    """Returns (maximum, sum relative to it) with one more logarithm."""
    m, total = carry
    m_new = jnp.maximum(m, w)
    return m_new, total * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)

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
    TILE,
    WARPS,
    Spec,
    full,
    parts_of,
)

_WORD = 32
_ROUNDER = 2.0**23  # a float32 between it and twice it has no fraction


# A warp holds one block; a thread two neighbouring columns of one row.
_LAYOUT = plgpu.Layout.TILED(
    plgpu.Tiling(((WARPS, GROUP, GROUP), (2,))),
    warp_dims=(-4,),
    lane_dims=(-3, -2),
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


def mass_chunk(
    spec: Spec,
    lane,
    head,
    chunk,
    ends,
    kv_lengths,
    q_lengths,
    log_sums,
    probabilities,
    maxima,
    mass,
    final,
):
    """Writes the mass of 1024 keys of one lane and KV head."""
    G, group = spec.group_size, spec.groups[spec.mass_group]
    is_edges = spec.mass_rows == "edges"
    tiles = 1 if is_edges else group.tiles_per_lane
    lane_index = group.first_lane + lane
    q_len = q_lengths[lane_index]
    base = kv_lengths[lane_index, head] - q_len
    used = jnp.minimum(q_len, 2 if is_edges else group.num_queries) * G
    first_block = chunk * MASS_BLOCKS
    levels = (1 << spec.config.mass_bits) - 1
    share = 1.0 / (jnp.maximum(used, 1) * levels).astype(jnp.float32)

    def segment(number):
        return (lane * group.tiles_per_lane + number) * spec.num_heads + head

    @pl.when(first_block * BLOCK < base)
    def _finals():
        def write(number, _):
            index = spec.mass_segments[0] + segment(number)
            _final_log_sums(spec, index, ends, log_sums, final.at[number])

        lax.fori_loop(0, tiles, write, None)
        plgpu.commit_smem()

    def add_tile(block, number, acc):
        rows = jnp.clip(used - number * group.step * G, 0, group.step * G)
        tile = (probabilities.at[segment(number)], maxima.at[segment(number)])
        return _add_rows(spec, block, rows, *tile, final.at[number], acc)

    def step(i, _):
        block = first_block + i * WARPS
        add = functools.partial(
            lax.fori_loop, 0, tiles, functools.partial(add_tile, block)
        )
        shape = (WARPS, GROUP, GROUP)
        acc = [full(shape, 0.0, _LAYOUT) for _ in range(BLOCK // GROUP)]
        acc = lax.cond(block * BLOCK < base, add, lambda acc: acc, acc)
        x = jnp.concatenate([x.sum(axis=1) for x in acc], axis=1) * share
        key = BLOCK * (
            block + plgpu.broadcasted_iota(jnp.int32, x.shape, 0, layout=_KEYS)
        )
        key += plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=_KEYS)
        mass[lane, head, pl.ds(block, WARPS)] = jnp.where(key < base, x, 0.0)

    num_blocks = jnp.minimum(spec.mass_blocks - first_block, MASS_BLOCKS)
    lax.fori_loop(0, lax.div(num_blocks, WARPS), step, None)


def _add_rows(spec: Spec, block, rows, probabilities, maxima, final, acc):
    """Returns sums with those of the first `rows` rows of four blocks of a tile."""
    bits, count = spec.config.mass_bits, spec.mass_tile_rows
    blocks = pl.ds(block, WARPS)
    for wanted in range(0, count, GROUP):
        # The last rows are read again where 8 more would be too many.
        first = max(0, min(wanted, count - GROUP))
        eight = pl.ds(first, GROUP)

        def load(ref, layout):
            return plgpu.load(ref, layout=layout, optimized=False)

        words = [
            load(probabilities.at[blocks, eight, pl.ds(word, GROUP)], _LAYOUT)
            for word in range(0, spec.mass_words, GROUP)
        ]
        w = load(maxima.at[blocks, eight], _LAYOUT.reduce(2))
        end = load(final.at[eight], _LAYOUT.reduce((0, 2)))
        w = jnp.exp2(w - lax.broadcast_in_dim(end, w.shape, [1]))
        row = plgpu.broadcasted_iota(jnp.int32, w.shape, 1, layout=_LAYOUT.reduce(2))
        w = jnp.where((row >= wanted - first) & (row < rows - first), w, 0.0)
        w = lax.broadcast_in_dim(w, acc[0].shape, [0, 1])
        pairs = zip(acc, unpack(words, bits), strict=True)
        acc = [a + n.astype(jnp.float32) * w for a, n in pairs]
    return acc


def _final_log_sums(spec: Spec, segment, ends, log_sums, final):
    """Writes the log sums of the rows of a segment over all its parts."""
    layout, at_once = plgpu.Layout.WGMMA.reduce(1), spec.parts_at_once
    first, last = parts_of(ends, segment, spec)

    def load(cta):
        w = log_sums.at[segment + jnp.minimum(cta, last - 1)]
        w = plgpu.load(w, layout=layout, optimized=False)
        return w + jnp.where(cta < last, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        m, total = carry
        for w in [load(first + i * at_once + k) for k in range(at_once)]:
            m_new = jnp.maximum(m, w)
            total = total * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)
            m = m_new
        return m, total

    init = (full((TILE,), 1.5 * MASK_VALUE, layout), full((TILE,), 0.0, layout))
    steps = lax.div(last - first + (at_once - 1), at_once)
    m, total = lax.fori_loop(0, steps, add, init)
    final[...] = m + jnp.log2(total)

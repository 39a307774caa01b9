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
    Spec,
    full,
    parts_of,
)

_PARTS = 2  # parts loaded at once
_ROWS = 4  # rows of probabilities loaded ahead
_WORD = 32
_ROUNDER = 2.0**23  # a float32 between it and twice it has no fraction


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
    H, G, group = spec.num_heads, spec.group_size, spec.groups[spec.mass_group]
    is_edges = spec.mass_rows == "edges"
    lane_index = group.first_lane + lane
    q_len = q_lengths[lane_index]
    base = kv_lengths[lane_index, head] - q_len
    used = jnp.minimum(q_len, 2 if is_edges else group.num_queries) * G
    first_block = pl.multiple_of(chunk * MASS_BLOCKS, MASS_BLOCKS)
    blocks = pl.ds(first_block, MASS_BLOCKS)
    bits = spec.config.mass_bits
    # Every thread holds two neighbouring columns of one block.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((MASS_BLOCKS, GROUP), (MASS_BLOCKS // 4, GROUP), (2,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )

    def add_tile(number, acc):
        index = (lane * group.tiles_per_lane + number) * H + head
        rows = jnp.clip(used - number * group.step * G, 0, group.step * G)

        def load(row):
            row = jnp.clip(row, 0, rows - 1)
            words = [
                plgpu.load(
                    probabilities.at[index, blocks, row, pl.ds(first, GROUP)],
                    layout=layout,
                    optimized=False,
                )
                for first in range(0, spec.mass_words, GROUP)
            ]
            m = maxima.at[index, blocks, row]
            return words, plgpu.load(m, layout=layout.reduce(1), optimized=False)

        def add_rows(i, carry):
            acc, loaded = carry
            ahead = [load((i + 1) * _ROWS + k) for k in range(_ROWS)]
            for k, (words, m) in enumerate(loaded):
                row = i * _ROWS + k
                w = jnp.exp2(m - final[jnp.minimum(row, rows - 1)])
                w = w * jnp.where(row < rows, 1.0, 0.0)
                w = lax.broadcast_in_dim(w, acc[0].shape, [0])
                numbers = unpack(words, bits)
                pairs = zip(acc, numbers, strict=True)
                acc = [a + n.astype(jnp.float32) * w for a, n in pairs]
            return acc, ahead

        def add_all(acc):
            loaded = [load(k) for k in range(_ROWS)]
            segment = spec.mass_segments[0] + index
            _final_log_sums(spec, segment, ends, log_sums, final)
            steps = lax.div(rows + (_ROWS - 1), _ROWS)
            return lax.fori_loop(0, steps, add_rows, (acc, loaded))[0]

        return lax.cond(rows > 0, add_all, lambda acc: acc, acc)

    acc = [full((MASS_BLOCKS, GROUP), 0.0, layout) for _ in range(BLOCK // GROUP)]
    for number in range(1 if is_edges else group.tiles_per_lane):
        acc = lax.cond(
            first_block * BLOCK < base,
            functools.partial(add_tile, number),
            lambda acc: acc,
            acc,
        )
    block = plgpu.broadcasted_iota(jnp.int32, acc[0].shape, 0, layout=layout)
    column = plgpu.broadcasted_iota(jnp.int32, acc[0].shape, 1, layout=layout)
    key = (block + first_block) * BLOCK + column
    share = 1.0 / (jnp.maximum(used, 1) * ((1 << bits) - 1)).astype(jnp.float32)
    for i, a in enumerate(acc):
        is_candidate = key + i * GROUP < base
        columns = pl.ds(i * GROUP, GROUP)
        mass[lane, head, blocks, columns] = jnp.where(is_candidate, a * share, 0.0)


def _final_log_sums(spec: Spec, segment, ends, log_sums, final):
    """Writes the log sums of the rows of a segment over all its parts."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    first, last = parts_of(ends, segment, spec)

    def load(cta):
        w = log_sums.at[segment + jnp.minimum(cta, last - 1)]
        w = plgpu.load(w, layout=layout, optimized=False)
        return w + jnp.where(cta < last, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        m, total = carry
        for w in [load(first + i * _PARTS + k) for k in range(_PARTS)]:
            m_new = jnp.maximum(m, w)
            total = total * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)
            m = m_new
        return m, total

    init = (full((TILE,), 1.5 * MASK_VALUE, layout), full((TILE,), 0.0, layout))
    steps = lax.div(last - first + (_PARTS - 1), _PARTS)
    m, total = lax.fori_loop(0, steps, add, init)
    final[...] = m + jnp.log2(total)
    plgpu.commit_smem()

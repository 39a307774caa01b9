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
    WARPS,
    Spec,
    full,
    parts_of,
)

_WORD = 32
_LOADS = 12  # of log sums in flight, which take registers
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
    """Writes the mass of every `mass_ctas`-th four blocks of one lane and KV head."""
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
        block = i * WARPS
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

    num_steps = spec.mass_blocks // WARPS
    turns = lax.div(num_steps - 1 - first_step, spec.mass_ctas) + 1
    lax.fori_loop(0, turns, lambda i, _: step(first_step + i * spec.mass_ctas, _), None)


def _add_tile(
    spec: Spec, segment, block, rows, ends, log_sums, probabilities, maxima, acc
):
    """Returns sums with those of the first `rows` rows of four blocks of a tile."""
    bits, count = spec.config.mass_bits, spec.mass_tile_rows
    by_row, blocks = _LAYOUT.reduce(2), pl.ds(block, WARPS)
    wanted = range(0, count, GROUP)
    # The last rows are read again where 8 more would be too many.
    firsts = [max(0, min(row, count - GROUP)) for row in wanted]

    def load(ref, layout):
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_words(first):
        columns = range(0, spec.mass_words, GROUP)
        windows = [(blocks, pl.ds(first, GROUP), pl.ds(c, GROUP)) for c in columns]
        return [load(probabilities.at[window], _LAYOUT) for window in windows]

    # All loads stand in front: they wait for memory together.
    words = [load_words(first) for first in firsts]
    tops = [load(maxima.at[blocks, pl.ds(first, GROUP)], by_row) for first in firsts]
    final = _final_log_sums(spec, segment, firsts, ends, log_sums)
    for i, first in enumerate(firsts):
        w = jnp.exp2(tops[i] - lax.broadcast_in_dim(final[i], tops[i].shape, [1]))
        row = plgpu.broadcasted_iota(jnp.int32, w.shape, 1, layout=by_row)
        w = jnp.where((row >= wanted[i] - first) & (row < rows - first), w, 0.0)
        w = lax.broadcast_in_dim(w, acc[0].shape, [0, 1])
        pairs = zip(acc, unpack(words[i], bits), strict=True)
        acc = [a + n.astype(jnp.float32) * w for a, n in pairs]
    return acc


def _final_log_sums(spec: Spec, segment, firsts, ends, log_sums) -> list:
    """Returns log sums over all parts of a segment, of eight rows from each first."""
    layout = _LAYOUT.reduce((0, 2))
    at_once = max(1, min(spec.parts_at_once, _LOADS // len(firsts)))
    first_part, last_part = parts_of(ends, segment, spec)

    def load(cta, first):
        part = segment + jnp.minimum(cta, last_part - 1)
        w = log_sums.at[part, pl.ds(first, GROUP)]
        w = plgpu.load(w, layout=layout, optimized=False)
        return w + jnp.where(cta < last_part, 0.0, 2 * MASK_VALUE)

    def add(i, carry):
        ctas = [first_part + i * at_once + k for k in range(at_once)]
        loaded = [[load(cta, first) for first in firsts] for cta in ctas]
        for part in loaded:
            carry = [_add_log(*pair) for pair in zip(carry, part, strict=True)]
        return carry

    zero = (full((GROUP,), 1.5 * MASK_VALUE, layout), full((GROUP,), 0.0, layout))
    steps = lax.div(last_part - first_part + (at_once - 1), at_once)
    sums = lax.fori_loop(0, steps, add, [zero] * len(firsts))
    return [m + jnp.log2(total) for m, total in sums]


def _add_log(carry, w):
    """Returns (maximum, sum relative to it) with one more logarithm."""
    m, total = carry
    m_new = jnp.maximum(m, w)
    return m_new, total * jnp.exp2(m - m_new) + jnp.exp2(w - m_new)

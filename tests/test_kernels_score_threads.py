"""What single threads of the scoring kernel do, followed in numpy.

The interpreter runs array code in their place. Here every lane of every warp takes its
words, widens its fields by the same bits and multiplies as PTX documents the fragments
of mma.m16n8k16; the results must lie where the layout of the logits says.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_select.codes import code_layout, decode, encode
from pallas_kernels.score_select.gpu_scores import (
    _MANTISSA,
    _POWERS_OF_2,
    TileSpec,
)

LANES = [(warp, lane) for warp in range(4) for lane in range(32)]


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))


def of_bits(bits):
    """The number of 16 bits."""
    return float(np.array([bits << 16], np.uint32).view(np.float32)[0])


def widened(word, ranges, codes):
    """A thread's keys of one channel, by field."""
    base, step = of_bits(ranges & 0xFFFF), of_bits(ranges >> 16)
    keys, below = [], _MANTISSA - codes.bits
    mask = (codes.levels - 1) << below
    for field in range(codes.fields):
        half, place = divmod(field, 16 // codes.bits)
        bits, shift = (word >> (16 * half)) & 0xFFFF, codes.bits * place - below
        bits = bits >> shift if shift > 0 else bits << -shift
        level = of_bits((bits & mask) | _POWERS_OF_2[codes.bits])
        assert codes.levels <= level < 2 * codes.levels
        keys.append(float(bfloat16(level * step + base)))
    return keys


def multiply(keys, queries, sums):
    """The fragments of 16 keys by 16 channels times 8 columns, by lane."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        row, column = divmod(lane, 4)
        places = (0, 0), (8, 0), (0, 8), (8, 8)
        for pair, (down, right) in zip(keys[lane], places, strict=True):
            first = 2 * column + right
            a[row + down, first : first + 2] = pair
        for pair, first in zip(queries[lane], (0, 8), strict=True):
            b[first + 2 * column : first + 2 * column + 2, row] = pair
    product, made = a @ b, []
    for lane in range(32):
        row, column = divmod(lane, 4)
        mine = product[[row, row + 8], 2 * column : 2 * column + 2].ravel()
        made.append([x + y for x, y in zip(sums[lane], mine, strict=True)])
    return made


def queries_of(lane, spec, q):
    """What the matrix unit takes of the queries: pairs of each product."""
    row, column = divmod(lane, 4)
    head, nothing = row % spec.columns, (0.0, 0.0)
    found = [tuple(q[head, 2 * column + n : 2 * column + n + 2]) for n in (0, 8)]
    if spec.sets == 1:
        return [found]
    is_second = row >= spec.columns
    return [[nothing, x] if is_second else [x, nothing] for x in found]


def logits_by_thread(spec, rows, channels, q):
    """{(warp, lane, register, element): logit}."""
    codes, rows, made = spec.codes, rows.view(np.uint32), {}
    for warp in range(4):
        pairs = []
        for lane in range(32):
            row, column = divmod(lane, 4)
            group, word = divmod(warp * 8 + row, codes.words)
            keys = []
            for number in (0, 1, 8, 9):
                channel = channels[2 * column + number]
                at = codes.head_size + channel * codes.words + word
                ranges = int(rows[group, channel])
                keys.append(widened(int(rows[group, at]), ranges, codes))
            pairs.append([list(zip(*keys[n : n + 2], strict=True)) for n in (0, 2)])
        factors = [queries_of(lane, spec, q) for lane in range(32)]
        zeros, results = [[0.0] * 4] * 32, [[] for _ in range(32)]
        per = 2 * spec.sets
        for first in range(0, codes.fields, per):
            sums = zeros
            if spec.sets == 1:
                taken = [
                    [p[i][first + n] for i in (0, 1) for n in (0, 1)] for p in pairs
                ]
                sums = multiply(taken, [f[0] for f in factors], sums)
            else:
                for i in range(2):
                    taken = [[p[i][first + n] for n in (0, 2, 1, 3)] for p in pairs]
                    sums = multiply(taken, [f[i] for f in factors], sums)
            for lane in range(32):
                results[lane] += sums[lane]
        for lane in range(32):
            for i, value in enumerate(results[lane]):
                made[warp, lane, *divmod(i, 2)] = value
    return made


def places_by_layout(spec):
    """{(warp, lane, register, element): (key, column)}, as the layout has it."""
    layout, shape = spec.layout.to_mgpu(), (spec.keys, spec.columns)
    strides = layout.tiling.tile_strides((spec.columns, 1))
    sizes = layout.tiled_tiling_shape

    def offset(index, dims):
        total = 0
        for dim in reversed(dims):
            index, rest = divmod(index, sizes[dim])
            total += rest * strides[dim]
        return total

    places = {}
    for warp, lane in LANES:
        thread = offset(warp, layout.warp_dims) + offset(lane, layout.lane_dims)
        for number, register in enumerate(np.ndindex(*layout.registers_shape(shape))):
            first = thread + sum(np.multiply(register, strides))
            for i in range(layout.vector_length):
                place = first + i * strides[layout.vector_dim]
                places[warp, lane, number, i] = divmod(int(place), spec.columns)
    return places


def key_of_register(spec, lane, number):
    """What `gpu_scores.key_of_register` computes, of warp 0."""
    row, block, fields = lane >> 2, spec.codes.block_words, spec.codes.fields
    key = row // block * block * fields + row % block
    key += ((lane >> 1) & 1) * block * (spec.sets == 2)
    return key + number * spec.sets * block


@pytest.mark.parametrize(
    ("page_size", "bits", "group_size"),
    [(64, 4, 4), (16, 4, 3), (128, 4, 7), (64, 2, 8), (8, 2, 1), (16, 2, 4)],
)
def test_threads_have_the_logits_that_the_layout_says(page_size, bits, group_size):
    codes = code_layout(page_size, 64, bits, {4: 128, 2: 64}[bits])
    spec, rng = TileSpec(codes, group_size), np.random.default_rng(0)
    groups = spec.keys // codes.group
    keys = jnp.asarray(rng.normal(size=(groups, codes.group, 64)), jnp.float32)
    rows = encode(keys, jnp.ones(keys.shape[:2], bool), codes)
    channels = rng.permutation(64)[:16]
    q = np.array(bfloat16(rng.normal(size=(8, 16))))
    q[group_size:] = 0
    rounded = np.asarray(decode(rows, codes).astype(jnp.float32)).reshape(-1, 64)
    expected = rounded[:, channels] @ q.T
    got, places = logits_by_thread(spec, np.asarray(rows), channels, q), {}
    places = places_by_layout(spec)
    assert got.keys() == places.keys()
    assert len(set(places.values())) == spec.keys * spec.columns
    for thread, (key, column) in places.items():
        assert abs(got[thread] - expected[key, column]) < 1e-4
        warp, lane, number, _ = thread
        in_warp = key_of_register(spec, lane, number)
        assert key == warp * 8 * codes.fields + in_warp

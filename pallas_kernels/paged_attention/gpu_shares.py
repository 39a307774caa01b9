"""The stream of work of the Hopper attention kernel, and its cut into equal shares.

All 64-key blocks of all segments form one stream; every CTA owns a contiguous share of
it, and a segment is cut wherever a share ends. `gpu_plan` tells the other cut.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.paged_attention.gpu_layout import (
    UNIT,
    UNITS,
    Spec,
    round_up,
    visible_keys,
)


def segment_ends(kv_lengths: jax.Array, q_lengths: jax.Array, spec: Spec) -> jax.Array:
    """Returns where every segment ends in the stream of work.

    The stream has units of work, one for every 16 keys that are copied. A block belongs
    to the CTA whose share of the stream has the first unit of the block.
    int32 [segments padded to 128]; the padding repeats the total. One fused reduction,
    the same for all layers of a model, so a compiled step computes it once.
    """
    if spec.num_tiles == spec.num_lanes:
        visible = jnp.where(q_lengths[:, None] > 0, kv_lengths, 0)
    else:
        tile = spec.tile(np.arange(spec.num_tiles, dtype=np.int32))
        fields = (q_lengths[tile.lane], *tile[2:4], tile.has_edges)
        visible = visible_keys(kv_lengths[tile.lane], *(x[:, None] for x in fields))
    index = np.arange(round_up(spec.num_segments, 128))[:, None, None]
    before = np.arange(spec.num_segments).reshape(1, *visible.shape) <= index
    return jnp.sum(jnp.where(before, num_units(visible, spec)[None], 0), axis=(1, 2))


def num_units(visible, spec: Spec):
    """Returns the work of a segment with a number of visible keys."""
    copy_rows = min(spec.config.copy_rows, spec.page_size)
    copied = jnp.maximum(round_up(visible, copy_rows), UNIT)
    return jnp.where(visible > 0, lax.div(copied + (UNIT - 1), UNIT), 0)


def blocks_before(unit, start):
    """Returns how many blocks of a segment begin before a unit of the stream."""
    return lax.div(jnp.maximum(unit - start, 0) + (UNITS - 1), UNITS)


def segment_start(ends_ref, segment):
    """Returns where a segment starts in the stream."""
    before = ends_ref[jnp.maximum(segment - 1, 0)]
    return jnp.where(segment == 0, 0, before)


def last_block_of(ends_ref, segment, spec: Spec):
    """Returns the unit of the stream where the last block of a segment starts."""
    start = segment_start(ends_ref, segment)
    return start + lax.div(ends_ref[segment] - start - 1, UNITS) * UNITS


def next_segment(ends_ref, index, spec: Spec):
    """Returns the first segment behind `index` that has keys, or the last one."""
    end, last = ends_ref[index], spec.num_segments - 1
    return lax.while_loop(
        lambda s: (s < last) & (ends_ref[s] <= end),
        lambda s: s + 1,
        jnp.minimum(index + 1, last),
    )


def first_block(ends_ref, index, unit, spec: Spec):
    """Returns segment, its start and the first block at or behind a unit.

    `index` is the segment that the unit lies in; where it lies behind the start of the
    last block, the first block of the next segment is returned.
    """
    start = segment_start(ends_ref, index)
    block = blocks_before(unit, start)
    return lax.cond(
        start + block * UNITS > last_block_of(ends_ref, index, spec),
        lambda: (next_segment(ends_ref, index, spec), ends_ref[index], jnp.int32(0)),
        lambda: (index, start, block),
    )


def parts_of(ends_ref, segment, spec: Spec):
    """Returns the range of CTAs that own blocks of a segment; empty if it has none."""
    total, num_ctas = shares(ends_ref, spec)
    start, end = segment_start(ends_ref, segment), ends_ref[segment]
    last_block = last_block_of(ends_ref, segment, spec)
    first = lax.div((start + 1) * num_ctas - 1, total)
    last = lax.div((last_block + 1) * num_ctas - 1, total) + 1
    return first, jnp.where(end > start, last, first)


def shares(ends_ref, spec: Spec):
    """Returns the units of the stream, at least 1, and the CTAs that divide them.

    CTA c owns units c * total // CTAs to (c + 1) * total // CTAs: as many as a block
    has, since a segment's parts are those of all CTAs from its first to its last. More
    CTAs that do not make the largest share smaller, in blocks, would only end earlier
    than the others, and leave the last blocks to a few.
    """
    total = jnp.maximum(ends_ref[spec.num_segments - 1], 1)
    blocks = lax.div(total, UNITS)
    largest = jnp.maximum(lax.div(blocks - 1, spec.config.num_ctas) + 1, 1)
    return total, jnp.maximum(lax.div(blocks + largest - 1, largest), 1)


def share_of(cta, ends_ref, spec: Spec):
    """Returns the half-open range of units that a CTA owns; empty if there are none."""
    units, (_, num_ctas) = ends_ref[spec.num_segments - 1], shares(ends_ref, spec)

    def begin(cta):
        return lax.div(jnp.minimum(cta, num_ctas) * units, num_ctas)

    return begin(cta), begin(cta + 1)

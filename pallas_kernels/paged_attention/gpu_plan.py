"""Which CTA of the Hopper attention kernel computes what, and where its parts go.

Free segments are cut wherever a CTA's share ends (`gpu_shares`). The keys of the others
are cut at multiples of `piece` keys, so that neither the neighbours nor the number of
CTAs moves a cut; a CTA computes whole pieces, each a part of its own. Free segments
come first in the stream and fill the shares up:

    free    |c0|  c1  | c2 |c3|  ...    blocks of 64 keys, cut anywhere
    pieces  | c0 |c1| c2 | c3 |  ...    one CTA has more pieces than another

The plan of such a call is made once by XLA, for all layers that share their lengths.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import gpu_shares
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    TILE,
    UNIT,
    UNITS,
    Spec,
    round_up,
)
from pallas_kernels.paged_attention.gpu_shares import blocks_before, segment_start


class Visit(NamedTuple):
    """A block of the stream."""

    segment: jax.Array
    start: jax.Array  # unit of the stream where the segment starts
    block: jax.Array  # inside the segment

    @property
    def unit(self):
        """Unit of the stream where the block starts."""
        return self.start + self.block * UNITS


class Share(NamedTuple):
    """What one CTA computes: units `low` to `high`, or two ranges."""

    low: jax.Array
    high: jax.Array
    number: jax.Array  # of its part of a free segment
    turn: jax.Array | None = None  # where the first range ends, or there is one only
    pieces: Visit | None = None  # where the second begins

    def range_of(self, start):
        """Returns the range of units for segments that start at a unit."""
        if self.turn is None:
            return self.low, self.high
        is_first = start < self.turn
        low = jnp.where(is_first, self.low, self.pieces.unit)
        return low, jnp.where(is_first, self.turn, self.high)


def launch_plan(kv_lengths: jax.Array, q_lengths: jax.Array, spec: Spec) -> jax.Array:
    """Returns the plan, int32 [n]: where segments end, then the tables of `_TABLES`."""
    ends = gpu_shares.segment_ends(kv_lengths, q_lengths, spec)
    if spec.piece is None:
        return ends
    tables = _plan_pieces(ends, spec)
    return jnp.concatenate([ends, *(tables[name] for name in _tables(spec))])


def _tables(spec: Spec) -> dict[str, int]:
    """Returns the tables behind the ends of all segments, and their sizes."""
    num_ctas, num_free = spec.config.num_ctas, spec.num_free[0]
    sizes = dict(piece_cuts=num_ctas + 1, piece_segments=num_ctas + 1)
    if num_free:
        sizes |= dict(free_cuts=num_ctas + 1, free_segments=num_ctas + 1)
        sizes |= dict(numbers=num_ctas, first_parts=num_free, last_parts=num_free)
    return sizes


def _read(plan_ref, spec: Spec, name: str, index):
    """Returns an entry of a table of the plan."""
    place = round_up(spec.num_segments, 128)
    for table, size in _tables(spec).items():
        if table == name:
            return plan_ref[place + index]
        place += size
    raise KeyError(name)


def _plan_pieces(ends, spec: Spec) -> dict[str, jax.Array]:
    """Returns the tables of `_tables`.

    Pieces are shared out evenly, each to the CTA in whose even share most of it lies.
    Free blocks then make the sum of the first c shares c / CTAs of all work, for every
    c, unless pieces alone are more.
    """
    num_ctas, num_free = spec.config.num_ctas, spec.num_free[0]
    ends = ends[: spec.num_segments]
    total, share = ends[-1], jnp.arange(num_ctas + 1)
    free = ends[num_free - 1] if num_free else jnp.int32(0)

    def even(work):  # share * work / CTAs, without its overflow
        return share * (work // num_ctas) + share * (work % num_ctas) // num_ctas

    size = spec.piece // UNIT
    cuts = _cut(ends, free + even(total - free), size, size // 2)
    tables = dict(piece_cuts=cuts, piece_segments=_segment_at(ends, cuts))
    if not num_free:
        return tables
    wanted = lax.cummax(jnp.clip(even(total) - (cuts - free), 0, free))
    cuts = _cut(ends, wanted, UNITS, UNITS - 1)
    tables |= dict(free_cuts=cuts, free_segments=_segment_at(ends, cuts))
    low, high = cuts[:-1], cuts[1:]
    has_any = low < high
    tables["numbers"] = jnp.cumsum(has_any) - has_any
    starts, ends = jnp.append(0, ends[: num_free - 1])[:, None], ends[:num_free, None]
    first = jnp.sum(has_any & (high <= starts), axis=1)
    last = jnp.sum(has_any & (low < ends), axis=1)
    has_keys = (ends > starts)[:, 0]
    tables |= dict(first_parts=first, last_parts=jnp.where(has_keys, last, first))
    return jax.tree.map(lambda x: x.astype(jnp.int32), tables)


def _segment_at(ends, unit):
    """Returns the segments that units lie in, the number of segments behind all."""
    return jnp.sum(ends[None] <= unit[:, None], axis=1, dtype=jnp.int32)


def _cut(ends, unit, size: int, up: int):
    """Returns units moved to where a run of `size` units of a segment starts or ends.

    `up` is what is added before the division: 0 moves down, size - 1 up.
    """
    has_ended = ends[None] <= unit[:, None]
    start = jnp.max(jnp.where(has_ended, ends[None], 0), axis=1)
    end = jnp.min(jnp.where(has_ended, ends[-1], ends[None]), axis=1)
    return jnp.minimum(start + (unit - start + up) // size * size, end)


def with_share(spec: Spec, cta, plan_ref, run) -> None:
    """Calls run(share, first visit) in a kernel, if the CTA has a share."""
    if spec.piece is not None:
        share, first = _planned_share(spec, cta, plan_ref)
        pl.when(first.unit < share.high)(lambda: run(share, first))
        return
    low, high = gpu_shares.share_of(cta, plan_ref, spec)
    layout = plgpu.Layout.WG_STRIDED(plan_ref.shape, 1)
    has_ended = plgpu.load(plan_ref, layout=layout) <= low
    num_ended = jnp.sum(jnp.where(has_ended, 1, 0))

    @pl.when(low < high)
    def _find():
        first = Visit(*gpu_shares.first_block(plan_ref, num_ended, low, spec))
        pl.when(first.unit < high)(lambda: run(Share(low, high, cta), first))


def _planned_share(spec: Spec, cta, plan_ref) -> tuple[Share, Visit]:
    """Returns the share of a CTA in a call with pieces, and its first block."""

    def range_of(kind):
        low, high = (_read(plan_ref, spec, f"{kind}_cuts", cta + i) for i in range(2))
        has_any = low < high
        segment = _read(plan_ref, spec, f"{kind}_segments", cta)
        segment = jnp.where(has_any, segment, 0)
        start = jnp.where(has_any, segment_start(plan_ref, segment), low)
        return low, high, Visit(segment, start, blocks_before(low, start))

    low, high, pieces = range_of("piece")
    if not spec.num_free[0]:
        return Share(low, high, cta), pieces
    low, turn, free = range_of("free")
    number = _read(plan_ref, spec, "numbers", cta)
    first = Visit(*(jnp.where(low < turn, *x) for x in zip(free, pieces, strict=True)))
    return Share(low, high, number, turn, pieces), first


def choose(is_in_pieces: Any, pieces, free):
    """Returns one of two values or thunks by what `has_pieces` says."""
    if isinstance(is_in_pieces, bool):
        return pieces() if is_in_pieces else free()
    return jnp.where(is_in_pieces, pieces(), free())


def has_pieces(spec: Spec, segment):
    """Returns whether a segment is cut into pieces; a bool where all are alike."""
    num_free = spec.num_free[0]
    if num_free in (0, spec.num_segments):
        return num_free == 0
    return segment >= num_free


def parts_of(plan_ref, segment, spec: Spec):
    """Returns the range of the parts of a segment; empty if it has none."""
    if spec.piece is None:
        return gpu_shares.parts_of(plan_ref, segment, spec)

    def pieces():
        size = spec.piece // UNIT
        units = plan_ref[segment] - segment_start(plan_ref, segment)
        return lax.div(units + (size - 1), size)

    def free(name):
        index = jnp.minimum(segment, spec.num_free[0] - 1)
        return _read(plan_ref, spec, name, index)

    is_in_pieces = has_pieces(spec, segment)
    first = choose(is_in_pieces, lambda: jnp.int32(0), lambda: free("first_parts"))
    return first, choose(is_in_pieces, pieces, lambda: free("last_parts"))


def pieces_of_row(spec: Spec, segment, own_key, last):
    """Returns the parts of a segment up to the last that a row may see.

    A piece behind the row's own key weighs nothing. To leave it out keeps even the sign
    of a zero independent of the rows beside this one.
    """
    if spec.piece is None:
        return last
    pieces = lax.div(jnp.maximum(own_key, 0), spec.piece) + 1
    return choose(has_pieces(spec, segment), lambda: pieces, lambda: last)


def part_blocks(spec: Spec, segment, first, last):
    """Returns the blocks of one part, of a CTA's blocks of a segment."""
    is_in_pieces = has_pieces(spec, segment)
    return choose(
        is_in_pieces, lambda: jnp.int32(spec.piece // BLOCK), lambda: last - first
    )


def part_number(spec: Spec, segment, share: Share, first):
    """Returns the number of a CTA's part of a segment that begins with a block."""
    if spec.piece is None:
        return share.number
    number = lax.div(first, spec.piece // BLOCK)
    return choose(has_pieces(spec, segment), lambda: number, lambda: share.number)


def num_part_rows(spec: Spec) -> int:
    """Returns the rows of all parts."""
    return _rows_of_free(spec) + (
        (spec.num_rows - spec.num_free[1]) * spec.num_heads * _max_pieces(spec)
    )


def num_parts(spec: Spec) -> int:
    """Returns the parts that there is room for."""
    return _num_free_parts(spec) + (
        (spec.num_segments - spec.num_free[0]) * _max_pieces(spec)
    )


def _max_pieces(spec: Spec) -> int:
    return 0 if spec.piece is None else spec.max_pieces


def _rows_of_free(spec: Spec) -> int:
    num_rows = spec.num_free[1]
    return num_rows and num_rows * spec.num_heads + spec.config.num_ctas * TILE


def _num_free_parts(spec: Spec) -> int:
    num_free = spec.num_free[0]
    return num_free and num_free + spec.config.num_ctas


def part_row(spec: Spec, tile_row, tile_rows, segment, number):
    """Returns the first row of a part of a segment.

    Along the stream of blocks the segment or the number of the CTA grows, so parts of
    free segments never overlap.
    """
    head = lax.rem(segment, spec.num_heads)

    def free():
        return tile_row * spec.num_heads + head * tile_rows + number * TILE

    def pieces():
        row = (tile_row - spec.num_free[1]) * spec.num_heads + head * tile_rows
        return _rows_of_free(spec) + row * spec.max_pieces + number * tile_rows

    return choose(has_pieces(spec, segment), pieces, free)


def part_index(spec: Spec, segment, number):
    """Returns the place of a part of a segment among all parts."""
    num_free = spec.num_free[0]

    def pieces():
        place = (segment - num_free) * spec.max_pieces + number
        return _num_free_parts(spec) + place

    return choose(has_pieces(spec, segment), pieces, lambda: segment + number)

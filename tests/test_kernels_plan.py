"""The launch plan of GPU attention: every block has one owner, and shares are even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import LaneGroup, gpu_plan
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
    UNIT,
    UNITS,
    AttentionConfig,
    Spec,
    group_tiles,
)
from pallas_kernels.paged_attention.gpu_shares import (
    first_block,
    next_segment,
    parts_of,
    segment_ends,
    share_of,
)


def spec_of(groups, num_heads, **config):
    """Returns the static part of a call with 4 query heads per KV head."""
    return Spec(
        groups=group_tiles(tuple(LaneGroup(*g) for g in groups), 4),
        num_out_tokens=sum(group[0] * group[1] for group in groups),
        num_heads=num_heads,
        group_size=4,
        head_size=128,
        page_size=64,
        table_width=64,
        scale=1.0,
        mass_group=None,
        mass_rows="all",
        config=AttentionConfig(**config),
        dtype=jnp.dtype(jnp.bfloat16),
        interpret=None,
    )


def owned_blocks(spec, kv_lengths, q_lengths):
    """Returns the blocks of every CTA, found as the launch finds them.

    Lists of (segment, block); also the ends of all segments and their visible keys.
    """
    ends = segment_ends(jnp.asarray(kv_lengths), jnp.asarray(q_lengths), spec)
    visible = np.where(q_lengths[:, None] > 0, kv_lengths, 0).reshape(-1)
    ctas = jnp.arange(spec.config.num_ctas)
    shares = np.stack(jax.vmap(lambda cta: share_of(cta, ends, spec))(ctas), axis=1)
    find = jax.jit(lambda index, unit: first_block(ends, index, unit, spec))
    follow = np.asarray(
        jax.vmap(lambda s: next_segment(ends, s, spec))(jnp.arange(spec.num_segments))
    )
    owned, unit_ends = [], np.asarray(ends)
    for low, high in shares:
        blocks = []
        owned.append(blocks)
        if low >= high:
            continue
        index = np.sum(unit_ends <= low)
        assert index < spec.num_segments, "a share must begin in a segment"
        segment, start, block = map(int, find(index, low))
        while start + UNITS * block < high:
            assert len(blocks) <= unit_ends[-1], "a CTA must come to an end"
            blocks.append((segment, block))
            block += 1
            if block * BLOCK >= visible[segment]:
                start, block = int(unit_ends[segment]), 0
                segment = int(follow[segment])
    return owned, ends, visible


def assert_owned_once(spec, kv_lengths, q_lengths):
    """Asserts that CTAs own all blocks in order, and that parts are their owners."""
    owned, ends, visible = owned_blocks(spec, kv_lengths, q_lengths)
    blocks = [block for part in owned for block in part]
    wanted = [(s, b) for s, n in enumerate(visible) for b in range(-(-n // BLOCK))]
    assert blocks == wanted
    segments = jnp.arange(spec.num_segments)
    firsts, lasts = jax.vmap(lambda s: parts_of(ends, s, spec))(segments)
    owners = [set() for _ in range(spec.num_segments)]
    for cta, part in enumerate(owned):
        for segment, _ in part:
            owners[segment].add(cta)
    for own, first, last in zip(owners, firsts.tolist(), lasts.tolist(), strict=True):
        assert own == set(range(first, last))


@pytest.mark.parametrize("num_ctas", [1, 3, 40, 264])
def test_every_block_has_one_owner_and_parts_are_those_of_owners(num_ctas):
    rng = np.random.default_rng(num_ctas)
    spec = spec_of(((9, 1), (4, 9)), 3, num_ctas=num_ctas)
    for longest in (0, 1, 60, 700):
        kv_lengths = rng.integers(0, longest + 1, (13, 3)).astype(np.int32)
        assert_owned_once(spec, kv_lengths, rng.integers(0, 2, 13).astype(np.int32))


@pytest.mark.parametrize("num_lanes", [24, 64, 256])
def test_every_block_of_many_segments_has_one_owner(num_lanes):
    rng = np.random.default_rng(num_lanes)
    spec = spec_of(((num_lanes, 1),), 8)
    shape = (num_lanes, 8)
    for kv_lengths in (
        np.zeros(shape),
        np.ones(shape),
        np.full(shape, 64),
        np.full(shape, 513),
        np.where(np.arange(num_lanes)[:, None] == num_lanes // 2, 5, 0) + np.zeros(8),
        rng.integers(0, 300, shape) * (rng.random((num_lanes, 1)) < 0.5),
        rng.integers(0, 2, shape) * rng.integers(0, 2000, shape),
    ):
        lengths = kv_lengths.astype(np.int32)
        assert_owned_once(spec, lengths, np.ones(num_lanes, np.int32))
        assert_owned_once(spec, lengths, (lengths[:, 0] > 0).astype(np.int32))


def test_shares_are_even_in_keys_read():
    # 57 drafts of 137 keys, of whose last block 9 keys are used, and 7 verifications:
    # with equal numbers of blocks the largest share is 1.085 times the mean.
    spec = spec_of(((57, 1), (7, 9)), 8)
    kv_lengths = np.repeat(np.array([[137]] * 57 + [[2565]] * 7, np.int32), 8, axis=1)
    owned, _, visible = owned_blocks(spec, kv_lengths, np.ones(64, np.int32))
    reads = [
        sum(min(BLOCK, -(-(visible[s] - b * BLOCK) // 32) * 32) for s, b in blocks)
        for blocks in owned
    ]
    assert max(reads) < 1.05 * np.mean(reads)


# -- pieces ----------------------------------------------------------------------------


def tables_of(spec, kv_lengths, q_lengths):
    """Returns the ends of all segments, and the tables of the plan."""
    plan = np.asarray(gpu_plan.launch_plan(kv_lengths, q_lengths, spec))
    sizes = gpu_plan._tables(spec)
    ends, place = plan[: spec.num_segments], len(plan) - sum(sizes.values())
    tables = {}
    for name, size in sizes.items():
        tables[name], place = plan[place : place + size], place + size
    return ends, tables


def runs_of(ends, segments, size):
    """Returns where runs of so many units of some segments start."""
    starts = np.append(0, ends)[segments]
    return [
        u
        for s, e in zip(starts, ends[segments], strict=True)
        for u in range(s, e, size)
    ]


def assert_shares(cuts, found, ends, segments, size):
    """Asserts that shares are whole runs, all of them, and begin in these segments."""
    starts = runs_of(ends, segments, size)
    first = int(np.append(0, ends)[segments[0]]) if len(segments) else 0
    last = int(ends[segments[-1]]) if len(segments) else 0
    assert (cuts[0], cuts[-1]) == (first, last)
    assert (np.diff(cuts) >= 0).all()
    assert set(cuts.tolist()) <= {*starts, last}
    for low, high, segment in zip(cuts, cuts[1:], found, strict=False):
        if low < high:
            assert np.append(0, ends)[segment] <= low < ends[segment]


@pytest.mark.parametrize("num_ctas", [1, 3, 40, 264])
@pytest.mark.parametrize("groups", [((9, 1, 128),), ((9, 1), (4, 9, 128))], ids=str)
def test_shares_are_whole_pieces_and_blocks(groups, num_ctas):
    rng = np.random.default_rng(num_ctas)
    spec = spec_of(groups, 3, num_ctas=num_ctas)
    segments = np.arange(spec.num_segments)
    free, pieces = np.split(segments, [spec.num_free[0]])
    for longest in (0, 1, 60, 700, 2000):
        kv_lengths = rng.integers(0, longest + 1, (spec.num_lanes, 3)).astype(np.int32)
        q_lengths = rng.integers(0, 2, spec.num_lanes).astype(np.int32)
        ends, tables = tables_of(spec, kv_lengths, q_lengths)
        names = "piece_cuts", "piece_segments"
        assert_shares(*(tables[n] for n in names), ends, pieces, 128 // UNIT)
        if not len(free):
            continue
        cuts = tables["free_cuts"]
        assert_shares(cuts, tables["free_segments"], ends, free, UNITS)
        used = np.flatnonzero(np.diff(cuts))
        numbers = tables["numbers"][used]
        assert numbers.tolist() == list(range(len(used)))
        for segment in free:
            starts = runs_of(ends, [segment], UNITS)
            owners = np.searchsorted(cuts[1:], starts, side="right")
            found = tables["first_parts"][segment], tables["last_parts"][segment]
            wanted = set(tables["numbers"][owners].tolist())
            assert wanted == set(range(*map(int, found)))


def test_free_blocks_fill_shares_of_pieces():
    spec = spec_of(((57, 1), (7, 9, 256)), 8)
    kv_lengths = np.repeat(np.array([[137]] * 57 + [[2565]] * 7, np.int32), 8, axis=1)
    _, tables = tables_of(spec, kv_lengths, np.ones(64, np.int32))
    pieces, free = (np.diff(tables[name]) for name in ("piece_cuts", "free_cuts"))
    assert max(pieces) > 1.3 * np.mean(pieces)
    assert max(pieces + free) <= np.mean(pieces + free) + UNITS


def test_parts_of_pieces_and_of_free_segments_lie_apart():
    spec = spec_of(((9, 1), (4, 9, 128)), 3, num_ctas=5)
    rows, indices = [], []
    for segment in range(spec.num_segments):
        tile = spec.tile(np.int32(segment // spec.num_heads))
        is_piece = segment >= spec.num_free[0]
        # Numbers of free segments grow along the stream.
        numbers = (
            range(spec.max_pieces) if is_piece else [segment // 6, segment // 6 + 1]
        )
        for number in numbers if is_piece or segment % 6 == 5 else numbers[:1]:
            args = np.int32(segment), np.int32(number)
            row = int(gpu_plan.part_row(spec, tile.row, tile.rows, *args))
            rows += range(row, row + int(tile.rows))
            indices.append(int(gpu_plan.part_index(spec, *args)))
    assert len(set(rows)) == len(rows) and max(rows) < gpu_plan.num_part_rows(spec)
    assert len(set(indices)) == len(indices) and max(indices) < gpu_plan.num_parts(spec)

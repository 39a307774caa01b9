"""The launch plan of GPU attention: every block has one owner, and shares are even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import LaneGroup
from pallas_kernels.paged_attention.gpu_layout import (
    BLOCK,
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
        num_out_tokens=sum(lanes * queries for lanes, queries in groups),
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

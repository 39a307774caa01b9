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
    first_block,
    group_tiles,
    parts_of,
    segment_ends,
    share_of,
)


def spec_of(groups, num_heads, **config):
    """Returns the static part of a call with 4 query heads per KV head."""
    return Spec(
        groups=group_tiles(tuple(LaneGroup(*g) for g in groups), 4),
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
    """Returns the blocks of every CTA as lists of (segment, block), from the plan."""
    ends = segment_ends(jnp.asarray(kv_lengths), jnp.asarray(q_lengths), spec)
    visible = np.where(q_lengths[:, None] > 0, kv_lengths, 0).reshape(-1)
    ctas = jnp.arange(spec.config.num_ctas)
    shares = np.stack(jax.vmap(lambda cta: share_of(cta, ends, spec))(ctas), axis=1)
    find = jax.jit(lambda index, unit: first_block(ends, index, unit, spec))
    owned, unit_ends = [], np.asarray(ends)
    for low, high in shares:
        blocks = []
        owned.append(blocks)
        if low == high:
            continue
        segment, start, block = map(int, find(np.sum(unit_ends <= low), low))
        while start + UNITS * block < high:
            blocks.append((segment, block))
            block += 1
            if block * BLOCK >= visible[segment]:
                start, block = unit_ends[segment], 0
                later = np.flatnonzero(visible[segment + 1 :])
                if not later.size:
                    break
                segment += 1 + int(later[0])
    return owned, ends, visible


@pytest.mark.parametrize("num_ctas", [1, 3, 40, 264])
def test_every_block_has_one_owner_and_parts_are_those_of_owners(num_ctas):
    rng = np.random.default_rng(num_ctas)
    groups = ((9, 1), (4, 9))
    spec = spec_of(groups, 3, num_ctas=num_ctas)
    for longest in (0, 1, 60, 700):
        kv_lengths = rng.integers(0, longest + 1, (13, 3)).astype(np.int32)
        q_lengths = rng.integers(0, 2, 13).astype(np.int32)
        owned, ends, visible = owned_blocks(spec, kv_lengths, q_lengths)
        blocks = [block for part in owned for block in part]
        wanted = [(s, b) for s, n in enumerate(visible) for b in range(-(-n // BLOCK))]
        assert blocks == wanted
        segments, ends = jnp.arange(spec.num_segments), jnp.asarray(ends)
        firsts, lasts = jax.vmap(lambda s, e: parts_of(e, s, spec), (0, None))(
            segments, ends
        )
        for segment in range(spec.num_segments):
            owners = [c for c, b in enumerate(owned) if any(s == segment for s, _ in b)]
            assert owners == list(range(firsts[segment], lasts[segment]))


def test_shares_are_even_in_keys_read():
    # 57 drafts of 137 keys, of whose last block 9 keys are used, and 7 verifications:
    # equal numbers of blocks would read up to a fifth more keys than the mean.
    spec = spec_of(((57, 1), (7, 9)), 8)
    kv_lengths = np.repeat(np.array([[137]] * 57 + [[2565]] * 7, np.int32), 8, axis=1)
    owned, _, visible = owned_blocks(spec, kv_lengths, np.ones(64, np.int32))
    reads = [
        sum(min(BLOCK, -(-(visible[s] - b * BLOCK) // 32) * 32) for s, b in blocks)
        for blocks in owned
    ]
    assert max(reads) < 1.05 * np.mean(reads)

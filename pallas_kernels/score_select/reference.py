"""The specification of scoring by an index and of the selection, in plain jnp."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.array_types import (
    KeyCodes,
    PageTable,
    PerLane,
    Queries,
    Scores,
)
from pallas_kernels.score_select.codes import CodeLayout, decode, ranges_of
from pallas_kernels.select_tokens.api import SelectedTokens
from pallas_kernels.select_tokens.reference import select_tokens_reference

NUM_CHANNELS = 16  # that a query reads
SAMPLED_GROUPS = 16  # whose ranges tell how much a channel varies

# Scores are ranked by the highest bits of their float32: 64 ranks for each power of 2.
RANK_SHIFT, LOWEST_RANK, NUM_RANKS = 17, (127 - 32) * 64, 2048
RECENT_RANK = NUM_RANKS - 1


@functools.partial(jax.jit, static_argnames=("layout", "cap", "num_recent", "scale"))
def score_select_reference(
    q: Queries,
    codes: KeyCodes,
    page_table: PageTable,
    lengths: PerLane,
    budgets: PerLane,
    *,
    layout: CodeLayout,
    cap: int,
    num_recent: int,
    scale: float,
) -> SelectedTokens:
    """Returns what `api.score_select` documents; same arguments, no checks."""
    scores = index_scores(q, codes, page_table, lengths, layout=layout, scale=scale)
    ranks = ranks_of(scores).astype(jnp.float32)
    return select_tokens_reference(
        ranks, lengths, budgets, cap=cap, num_recent=num_recent, per_layer=False
    )


def index_scores(
    q: Queries,
    codes: KeyCodes,
    page_table: PageTable,
    lengths: PerLane,
    *,
    layout: CodeLayout,
    scale: float,
) -> Scores:
    """Returns the estimated attention float32 [lanes, H, W * ps], 0 past a length."""
    lanes, num_heads, size = page_table.shape[0], codes.shape[1], layout.head_size
    rows = codes.at[page_table].get(mode="clip").swapaxes(1, 2)
    rows = rows.reshape(lanes, num_heads, -1, layout.row)
    q = q[:lanes].reshape(lanes, num_heads, -1, size).astype(jnp.float32)
    channels = heavy_channels(q, rows, lengths, layout)
    q = jnp.take_along_axis(q, channels[:, :, None], axis=-1)
    # Decoded as if there were no other channels.
    kept = channels[:, :, None]
    ranges = jnp.take_along_axis(rows[..., :size], kept, axis=-1)
    words = rows[..., size:].reshape(*rows.shape[:3], size, layout.words)
    words = jnp.take_along_axis(words, kept[..., None], axis=-2)
    words = words.reshape(*rows.shape[:3], -1)
    few = dataclasses.replace(layout, head_size=channels.shape[-1])
    keys = decode(jnp.concatenate([ranges, words], -1), few)
    keys = keys.reshape(lanes, num_heads, -1, few.head_size).astype(jnp.float32)
    logits = jnp.einsum("lhgc,lhkc->lhgk", q, keys, precision=jax.lax.Precision.HIGHEST)
    is_used = jnp.arange(keys.shape[2]) < lengths[:, None]
    is_used = is_used[:, None, None]
    shares = jax.nn.softmax(jnp.where(is_used, logits * scale, -1e30), -1)
    return jnp.where(is_used, shares, 0.0).mean(2)


def heavy_channels(q, rows, lengths, layout: CodeLayout):
    """Returns the channels int32 [lanes, H, 16] that the query is scored over.

    Those of the largest sum over the group's query heads of |q|, times the channel's
    step, the mean over at most 16 groups spread over the text; equal ones by the lowest
    channel. q float32 [lanes, H, G, D], rows int32 [lanes, H, groups, row].
    """
    num_groups = -(-lengths // layout.group)[:, None]
    sampled = jnp.minimum(num_groups, SAMPLED_GROUPS)
    place = jnp.arange(SAMPLED_GROUPS)
    index = place * num_groups // jnp.maximum(sampled, 1)
    index = jnp.clip(index, 0, rows.shape[2] - 1)
    _, step = ranges_of(
        jnp.take_along_axis(rows, index[:, None, :, None], axis=2), layout
    )
    step = jnp.where((place < sampled)[:, None, :, None], step, 0.0).sum(2)
    weight = jnp.abs(q).sum(2) * step
    return jax.lax.top_k(weight, min(NUM_CHANNELS, weight.shape[-1]))[1]


def ranks_of(scores):
    """Returns the ranks int32 of scores in [0, 1]."""
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32) >> RANK_SHIFT
    return jnp.clip(bits - LOWEST_RANK, 0, RECENT_RANK - 1)

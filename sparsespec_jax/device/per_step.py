"""Policies that select before every draft step: exact and slow.

They show what a selection of the same size could give if it were always fresh (the
per-step oracle), and the published form of selectors of every decoding step. The draft
cache then holds nothing selected, and a draft attends to its picks in the full cache,
in plain jnp on every platform; verification and prefill run on the engine's kernels.
"""

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import (
    KvPagesOfD,
    Queries,
    Selected,
    SelectedCounts,
)
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.lanes import StepLanes, take
from sparsespec_jax.device.state import read_rows
from sparsespec_jax.plan.shape import StepShape
from sparsespec_jax.policies.base import SelectionOptions, SelectionView, as_mask

_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def nothing(shape: StepShape) -> tuple[Selected, SelectedCounts]:
    """The empty selection of a verification."""
    indices = jnp.zeros((shape.verify_lanes, 1, shape.max_budget), jnp.int32)
    return indices, indices[..., 0]


def attend_drafts(
    context: StepContext,
    options: SelectionOptions,
    layer_index: int,
    q: Queries,
    out: Queries,
    kv_pages: KvPagesOfD,
    lanes: StepLanes,
) -> Queries:
    """`out` with the draft lanes' rows replaced.

    A draft sees what the policy selects of [0, start), and all rows of its draft cache:
    those of the last verification and the drafts so far.
    """
    draft, num_heads, size = lanes.draft, kv_pages.shape[1], q.shape[-1]
    num_lanes = context.shape.draft_lanes
    starts = jnp.where(draft.is_active, draft.starts, 0)
    num_tail = jnp.where(draft.is_active, draft.tails + 1, 0)
    old_k, old_v = _read(kv_pages, take(lanes.full_table, draft.slots), starts)
    new_k, new_v = _read(kv_pages, take(lanes.draft_table, draft.slots), num_tail)
    query = q[:num_lanes].reshape(num_lanes, num_heads, -1, size).astype(jnp.float32)
    old = _logits(query, old_k, starts)
    new = _logits(query, new_k, num_tail)
    every = jax.nn.softmax(jnp.concatenate([old, new], -1), -1)
    num_keys = old.shape[-1]
    view = SelectionView(
        mass=every[..., :num_keys].mean(2),
        queries=q[:num_lanes, None],
        keys=lambda: old_k,
        num_queries=draft.is_active.astype(jnp.int32),
        lengths=starts,
        budgets=jnp.where(draft.is_active, draft.budgets, 0),
        is_first=jnp.zeros(num_lanes, bool),
        state=None,
        seeds=draft.seeds,
        layer_index=layer_index,
        num_kv_heads=num_heads,
        num_keys=num_keys,
    )
    chosen = as_mask(view, *context.policy.select(view, options))[:, :, None]
    weights = jax.nn.softmax(
        jnp.concatenate([jnp.where(chosen, old, -1e30), new], -1), -1
    )
    mixed = jnp.einsum("lhgk,lhkd->lhgd", weights[..., :num_keys], old_v, **_EXACT)
    mixed += jnp.einsum("lhgk,lhkd->lhgd", weights[..., num_keys:], new_v, **_EXACT)
    drafts = mixed.reshape(num_lanes, -1, size).astype(out.dtype)
    return jnp.concatenate([drafts, out[num_lanes:]])


def _read(kv_pages, tables, lengths):
    """K and V float32 [S, H, X, D] of the first `lengths` rows, 0 behind them."""
    rows = read_rows(kv_pages, tables).astype(jnp.float32)
    used = jnp.arange(rows.shape[2]) < lengths[:, None]
    return jnp.split(jnp.where(used[:, None, :, None], rows, 0.0), 2, axis=-1)


def _logits(query, keys, lengths):
    """Scaled logits [S, H, G, X], very small past `lengths`."""
    product = jnp.einsum("lhgd,lhkd->lhgk", query, keys, **_EXACT)
    used = jnp.arange(keys.shape[2]) < lengths[:, None]
    return jnp.where(used[:, None, None], product * query.shape[-1] ** -0.5, -1e30)

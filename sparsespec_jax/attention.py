"""Attention of one mixed step: write KV rows, attend, select, fill the draft caches.

Binds pages, page tables, policy and kernels of a step into the `attend` function that
the model calls in every layer. The token axis of a step is

    [ S draft tokens | E verifications of Q tokens | F prefill chunks of C tokens ]

and each part is one lane group of a single paged-attention call.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gather_kv import gather_kv
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from sparsespec_jax.plan import StepShape
from sparsespec_jax.selection import SelectionOptions, SelectionView
from sparsespec_jax.state import LayerCache


class VerifyLanes(NamedTuple):
    """The verify lanes of a step; rows of an idle lane are dropped everywhere."""

    slots: jax.Array  # int32 [E], num_slots for an idle lane
    starts: jax.Array  # int32 [E], committed length before the verification
    num_rows: jax.Array  # int32 [E], valid rows (drafts + 1), 0 for an idle lane
    seeds: jax.Array  # uint32 [E, 2]
    budgets: jax.Array  # int32 [E], tokens to select


class StepLanes(NamedTuple):
    """Where each token of a step lives and what it sees."""

    draft_active: jax.Array  # bool [S] (size 0 in plain decoding)
    draft_tails: jax.Array  # int32 [S], rows behind the selected ones, own one excluded
    draft_table: jax.Array  # int32 [S, Wd]
    full_table: jax.Array  # int32 [S, W]
    verify: VerifyLanes
    prefill_slots: jax.Array  # int32 [F]
    prefill_starts: jax.Array  # int32 [F]
    prefill_counts: jax.Array  # int32 [F]


def make_attend(lanes: StepLanes, shape: StepShape, policy, options, impl):
    """The `attend(layer, q, k, v, cache)` function of one step.

    Returns a closure from q [T, N, D] and k, v [T, H, D] (rotated) and the layer's
    LayerCache to the attention output [T, N, D] and the next LayerCache.
    """
    groups = _lane_groups(shape, lanes)
    tables, q_lengths = _tables_and_rows(lanes, shape)
    drafting = shape.num_draft_tokens > 0
    selection = SelectionOptions(
        cap=shape.max_budget,
        per_layer=options.scope == "layer",
        num_recent=options.num_recent,
        num_sinks=options.num_sinks,
        impl=impl,
    )
    needs_mass = drafting and policy.needs_mass

    def attend(layer_index, q, k, v, cache):
        heads = k.shape[1]
        rows = jnp.concatenate([k, v], axis=-1).astype(cache.kv_pages.dtype)
        kv_pages = _write_rows(cache, rows, lanes, shape)
        kv_lengths = _kv_lengths(cache, lanes, shape, heads)
        out, mass = paged_attention(
            q,
            kv_pages,
            tables,
            kv_lengths,
            q_lengths,
            groups=groups,
            mass_group=(1 if shape.draft_lanes else 0) if needs_mass else None,
            mass_rows=options.mass_rows,
            impl=impl,
        )
        counts = cache.draft_counts
        if drafting:
            # Attention must be done with the pool before the draft caches are
            # filled: without this order XLA copies the pool, twice per layer.
            kv_pages, out = jax.lax.optimization_barrier((kv_pages, out))
            view = SelectionView(
                mass=mass,
                lengths=lanes.verify.starts,
                budgets=lanes.verify.budgets,
                seeds=lanes.verify.seeds,
                layer_index=layer_index,
                num_kv_heads=heads,
                num_keys=shape.table_width * shape.page_size,
            )
            indices, selected = policy.select(view, selection)
            is_live = (lanes.verify.num_rows > 0)[:, None]
            selected = jnp.where(is_live, selected, 0)
            kv_pages = _fill_draft_cache(
                kv_pages, rows, indices, selected, lanes, shape, impl
            )
            selected = jnp.broadcast_to(selected, (selected.shape[0], heads))
            counts = counts.at[lanes.verify.slots].set(selected, mode="drop")
        return out, LayerCache(kv_pages, counts)

    return attend


def _lane_groups(shape, lanes):
    groups = [
        LaneGroup(shape.draft_lanes, 1),
        LaneGroup(shape.verify_lanes, shape.num_queries),
        LaneGroup(lanes.prefill_slots.size, shape.prefill_chunk),
    ]
    return tuple(group for group in groups if group.num_lanes)


def _tables_and_rows(lanes, shape):
    """Page tables [lanes, W] and valid rows [lanes] of all groups, concatenated."""
    width = max(shape.table_width, shape.draft_table_width)

    def pad(table):
        missing = width - table.shape[1]
        return jnp.pad(table, ((0, 0), (0, missing)), constant_values=shape.num_pages)

    full = pad(lanes.full_table)
    tables = [
        pad(lanes.draft_table)[: shape.draft_lanes],
        full.at[lanes.verify.slots].get(mode="clip"),
        full.at[lanes.prefill_slots].get(mode="clip"),
    ]
    rows = [lanes.draft_active, lanes.verify.num_rows, lanes.prefill_counts]
    return (
        jnp.concatenate(tables),
        jnp.concatenate([r.astype(jnp.int32) for r in rows]),
    )


def _kv_lengths(cache, lanes, shape, heads):
    """Visible keys int32 [lanes, H]; a draft lane counts its selected rows per head."""
    selected = cache.draft_counts[: shape.draft_lanes]
    draft = selected + lanes.draft_tails[:, None] + 1
    draft = jnp.where(lanes.draft_active[:, None], draft, 0)
    verify = lanes.verify.starts + lanes.verify.num_rows
    verify = jnp.where(lanes.verify.num_rows > 0, verify, 0)
    prefill = lanes.prefill_starts + lanes.prefill_counts
    prefill = jnp.where(lanes.prefill_counts > 0, prefill, 0)
    flat = jnp.concatenate([verify, prefill])[:, None]
    return jnp.concatenate([draft, jnp.broadcast_to(flat, (flat.size, heads))])


def _write_rows(cache, rows, lanes, shape):
    """Store each token's K and V row where its lane reads it; rows [T, H, 2D]."""
    heads = rows.shape[1]
    split = (
        shape.draft_lanes,
        shape.draft_lanes + shape.verify_lanes * shape.num_queries,
    )
    draft_rows, verify_rows, prefill_rows = jnp.split(rows, split)

    place = cache.draft_counts[: shape.draft_lanes] + lanes.draft_tails[:, None]
    place = jnp.where(lanes.draft_active[:, None], place, -1)
    table = lanes.draft_table[: shape.draft_lanes]
    kv_pages = scatter_rows(
        cache.kv_pages, table[:, None], place[:, None], draft_rows[:, None]
    )

    verify = lanes.verify
    kv_pages = _write_span(
        kv_pages, lanes.full_table, verify.slots, verify.starts, verify.num_rows,
        verify_rows.reshape(shape.verify_lanes, shape.num_queries, heads, -1),
    )  # fmt: skip
    if lanes.prefill_slots.size:
        kv_pages = _write_span(
            kv_pages, lanes.full_table, lanes.prefill_slots, lanes.prefill_starts,
            lanes.prefill_counts,
            prefill_rows.reshape(-1, shape.prefill_chunk, heads, rows.shape[-1]),
        )  # fmt: skip
    return kv_pages


def _write_span(kv_pages, full_table, slots, starts, counts, rows):
    """Write rows [lanes, n, H, 2D] at positions starts.. of the slots' full tables."""
    lanes, num, heads, _ = rows.shape
    row = jnp.arange(num)[None]
    place = jnp.where(row < counts[:, None], starts[:, None] + row, -1)
    place = jnp.broadcast_to(place[..., None], (lanes, num, heads))
    table = full_table.at[slots].get(mode="clip")
    return scatter_rows(kv_pages, table[:, None], place, rows)


def _fill_draft_cache(kv_pages, rows, indices, selected, lanes, shape, impl):
    """Copy the selected rows, then the rows just verified, into the draft pages.

    indices [E, H, cap] and selected [E, H], or one list for all heads ([E, 1, ...]).
    """
    verify = lanes.verify
    heads = rows.shape[1]
    source = lanes.full_table.at[verify.slots].get(mode="clip")
    target = lanes.draft_table.at[verify.slots].get(mode="clip")
    kv_pages = gather_kv(kv_pages, source, target, indices, selected, impl=impl)
    first = shape.draft_lanes
    last = first + shape.verify_lanes * shape.num_queries
    tail = rows[first:last].reshape(shape.verify_lanes, shape.num_queries, heads, -1)
    row = jnp.arange(shape.num_queries)[None]
    selected = jnp.broadcast_to(selected, (selected.shape[0], heads))
    place = selected[:, None, :] + row[..., None]
    is_row = row < verify.num_rows[:, None]
    place = jnp.where(is_row[..., None], place, -1)
    return scatter_rows(kv_pages, target[:, None], place, tail)


def scatter_rows(kv_pages, tables, places, rows):
    """Write rows [lanes, n, H, 2D] at cache indices `places` [lanes, n, H].

    tables [lanes, 1, W]. Rows with a negative place or no page are dropped.
    """
    num_pages, heads, page_size, _ = kv_pages.shape
    column = jnp.maximum(places, 0) // page_size
    pages = jnp.take_along_axis(
        jnp.broadcast_to(tables, (*places.shape[:2], tables.shape[-1])),
        column,
        axis=-1,
        mode="fill",
        fill_value=num_pages,
    )
    pages = jnp.where((places >= 0) & (pages >= 0), pages, num_pages)
    head = jnp.arange(heads)[None, None]
    return kv_pages.at[pages, head, places % page_size].set(rows, mode="drop")

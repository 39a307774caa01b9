"""Attention of one mixed step: write KV rows, attend, select, fill the draft caches.

Binds pages, page tables, policy and kernels of a step into the `attend` function that
the model calls in every layer. The token axis of a step is

    [ A drafts of Qd tokens | E verifies of Q tokens | F prompt chunks of C tokens ]

and each part is one lane group of a single paged-attention call.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gather_kv import gather_kv_layers
from pallas_kernels.paged_attention import LaneGroup, paged_attention
from pallas_kernels.write_rows import write_rows
from sparsespec_jax import step_selection
from sparsespec_jax.plan import StepShape
from sparsespec_jax.policy import SelectionOptions, SelectionView, run_policy
from sparsespec_jax.state import read_rows


class VerifyLanes(NamedTuple):
    """The verify lanes of a step; rows of an idle lane are dropped everywhere."""

    slots: jax.Array  # int32 [E], num_slots for an idle lane
    starts: jax.Array  # int32 [E], committed length before the verification
    num_rows: jax.Array  # int32 [E], valid rows (drafts + 1), 0 for an idle lane
    seeds: jax.Array  # uint32 [E, 2]
    budgets: jax.Array  # int32 [E], tokens to select
    is_seed: jax.Array  # bool [E], the first verification of a request


class StepLanes(NamedTuple):
    """Where each token of a step lives and what it sees."""

    draft_slots: jax.Array  # int32 [A], num_slots for an idle lane (A 0: none drafts)
    draft_active: jax.Array  # bool [A]
    draft_rows: jax.Array  # int32 [A], tokens that an active draft lane feeds
    draft_tails: jax.Array  # int32 [A], rows behind the selected ones, own one excluded
    draft_seeds: jax.Array  # uint32 [A, 2]
    draft_starts: jax.Array  # int32 [A], committed length before the last verification
    draft_budgets: jax.Array  # int32 [A]
    draft_counts: jax.Array | None  # int32 [S, 1] if the policy's counts are fixed
    draft_table: jax.Array  # int32 [S, Wd]
    full_table: jax.Array  # int32 [S, W]
    verify: VerifyLanes
    prefill_slots: jax.Array  # int32 [F]
    prefill_starts: jax.Array  # int32 [F]
    prefill_counts: jax.Array  # int32 [F]

    def of_draft(self, array):
        """Rows [A, ...] of an array over slots; those of idle lanes are arbitrary."""
        return array.at[self.draft_slots].get(mode="clip")


class RowPlaces(NamedTuple):
    """Where rows of K and V go; a page past the pool drops its row."""

    pages: jax.Array  # int32 [n, H], or [n, 1] for all heads
    offsets: jax.Array  # int32, like pages: row inside the page


_ROWS_AT_ONCE = 264  # that a GPU selects as fast as fewer
_LAYERS_AT_ONCE = 8


def make_attend(
    lanes: StepLanes, shape: StepShape, policy, options, impl, *, num_layers
):
    """The functions `attend(layer, q, rows, cache)` and `fill(layers)` of one step.

    `attend` takes q [T, N, D] and rows [T, H, 2 * D] (K then V; q and K rotated) and
    the layer's LayerCache to the attention output [T, N, D] and the next LayerCache.
    With fixed counts all that depends on lengths is the same in every layer, and
    computed once. `fill` takes all LayerCaches after the last layer and fills the draft
    caches that a policy with `layers_at_once` left to it; other policies fill them in
    `attend`.
    """
    groups = _lane_groups(shape, lanes)
    tables, q_lengths = _tables_and_rows(lanes, shape)
    drafting = shape.draft_lanes > 0
    selection = SelectionOptions(
        cap=shape.max_budget,
        per_layer=options.scope == "layer",
        num_recent=options.num_recent,
        num_sinks=options.num_sinks,
        impl=impl,
    )
    verify_rows = slice(
        shape.num_draft_rows,
        shape.num_draft_rows + shape.verify_lanes * shape.num_queries,
    )

    picked = None  # by the newest layer below that selects, while tracing
    masses = []  # of the layers that select, left to `fill`: some in each array

    def attend(layer_index, q, rows, cache):
        nonlocal picked
        heads, rows = rows.shape[1], rows.astype(cache.kv_pages.dtype)
        fixed = lanes.draft_counts is not None
        counts = lanes.draft_counts if fixed else cache.draft_counts
        places = _row_places(lanes, shape, counts)
        if drafting and fixed:
            places += [_tail_places(lanes, shape, lanes.verify.budgets[:, None])]
        with jax.named_scope("write_rows"):
            kv_pages = write_rows(
                cache.kv_pages,
                rows,
                *_concatenate(places),
                copies_from=verify_rows.start,
                impl=impl,
            )
        selects = drafting and not policy.per_step and policy.is_anchor(layer_index)
        needs_mass = selects and policy.needs_mass
        buffer, place = None, 0
        if selects and policy.layers_at_once:
            number = layer_index // policy.anchor_every
            size = _masses_at_once(policy, shape, heads)
            place = number % size
            if place == 0:
                left = -(-num_layers // policy.anchor_every) - number
                num_keys = tables.shape[1] * shape.page_size
                masses.append(
                    jax.lax.empty(
                        (min(size, left), shape.verify_lanes, heads, num_keys),
                        jnp.float32,
                    )
                )
            buffer = masses.pop()
        with jax.named_scope("attention"):
            out, mass = paged_attention(
                q,
                kv_pages,
                tables,
                jnp.broadcast_to(
                    _kv_lengths(lanes, shape, counts), (q_lengths.size, heads)
                ),
                q_lengths,
                groups=groups,
                mass_group=1 if needs_mass else None,  # behind the draft lanes
                mass_rows=policy.mass_rows(options.mass_rows),
                mass_buffer=buffer,
                mass_place=place,
                impl=impl,
            )
        if not drafting:
            return out, cache._replace(kv_pages=kv_pages)
        # Attention must be done with the pool before the draft caches are
        # filled: without this order XLA copies the pool, twice per layer.
        kv_pages, out = jax.lax.optimization_barrier((kv_pages, out))
        cache = cache._replace(kv_pages=kv_pages)
        if policy.layers_at_once:
            if selects:
                masses.append(mass)
            return out, cache
        if policy.per_step:
            picked = step_selection.nothing(shape)
            out = step_selection.attend_drafts(
                policy, selection, layer_index, q, out, kv_pages, lanes, shape
            )
        if selects:
            view = _view(layer_index, q[verify_rows], mass, cache, lanes, shape, policy)
            with jax.named_scope("select"):
                indices, selected, memory = run_policy(policy, view, selection)
            picked = indices, _of_live_lanes(lanes, selected)
            if memory is not None:
                put = cache.policy_state.at[lanes.verify.slots]
                cache = cache._replace(policy_state=put.set(memory, mode="drop"))
        _, selected = picked
        with jax.named_scope("gather"):
            picks = (x[None] for x in picked)
            (kv_pages,) = _gather_selected((kv_pages,), *picks, lanes, impl)
        if not fixed:
            place = _tail_places(lanes, shape, selected)
            kv_pages = write_rows(kv_pages, rows[verify_rows], *place, impl=impl)
            selected = jnp.broadcast_to(selected, (selected.shape[0], heads))
            counts = counts.at[lanes.verify.slots].set(selected, mode="drop")
            cache = cache._replace(draft_counts=counts)
        return out, cache._replace(kv_pages=kv_pages)

    def fill(layers):
        filled = []
        for mass in masses:
            with jax.named_scope("select"):
                picks = _select_together(policy, selection, mass, lanes.verify)
            first, count = len(filled), len(mass) * policy.anchor_every
            group = layers[first : first + count]
            if policy.anchor_every > 1:
                picks = [
                    jnp.repeat(x, policy.anchor_every, axis=0)[: len(group)]
                    for x in picks
                ]
            with jax.named_scope("gather"):
                pools = tuple(cache.kv_pages for cache in group)
                pools = _gather_selected(pools, *picks, lanes, impl)
            filled += [
                cache._replace(kv_pages=pool)
                for cache, pool in zip(group, pools, strict=True)
            ]
        return filled or layers

    return attend, fill


def _masses_at_once(policy, shape, num_heads):
    """Layers whose masses are selected from together."""
    rows, layers = shape.verify_lanes * num_heads, policy.anchor_every
    return max(1, min(_ROWS_AT_ONCE // rows, _LAYERS_AT_ONCE // layers))


def _select_together(policy, options, masses, verify):
    """Indices [L, E, ...] and counts of masses [L, E, H, X], by one call of the policy.

    Idle lanes have no candidates, so their counts are 0: they are fixed.
    """
    count, lanes, num_heads, num_keys = masses.shape
    verify = jax.tree.map(lambda x: jnp.concatenate([x] * count), verify)
    mass = masses.reshape(count * lanes, num_heads, num_keys)
    view = _view_of_mass(None, mass, verify, num_heads, num_keys)
    indices, counts, _ = run_policy(policy, view, options)
    return [x.reshape(count, lanes, *x.shape[1:]) for x in (indices, counts)]


def _of_live_lanes(lanes, counts):
    """Counts [E, H or 1], 0 in idle lanes."""
    return jnp.where((lanes.verify.num_rows > 0)[:, None], counts, 0)


def _view(layer_index, queries, mass, cache, lanes, shape, policy):
    """The SelectionView of a layer's verification; queries [E * Q, N, D]."""
    verify, needs = lanes.verify, policy.needs
    size, num_keys = queries.shape[-1], shape.table_width * shape.page_size
    state = None
    if policy.state_shape:
        state = cache.policy_state.at[verify.slots].get(mode="clip")
        is_new = verify.is_seed.reshape(-1, *[1] * (state.ndim - 1))
        state = jnp.where(is_new, 0.0, state)

    def keys():
        table = lanes.full_table.at[verify.slots].get(mode="clip")
        used = jnp.arange(num_keys) < (verify.starts + verify.num_rows)[:, None]
        rows = read_rows(cache.kv_pages, table)[..., :size]
        return jnp.where(used[:, None, :, None], rows, 0)

    queries = queries.reshape(-1, shape.num_queries, *queries.shape[1:])
    return _view_of_mass(
        layer_index, mass, verify, cache.kv_pages.shape[1], num_keys
    )._replace(
        queries=queries if "queries" in needs else None,
        keys=keys if "keys" in needs else None,
        state=state,
    )


def _view_of_mass(layer_index, mass, verify, num_kv_heads, num_keys):
    """A SelectionView of verifications without queries, keys and state."""
    return SelectionView(
        mass=mass,
        queries=None,
        keys=None,
        num_queries=verify.num_rows,
        lengths=verify.starts,
        budgets=verify.budgets,
        is_first=verify.is_seed,
        state=None,
        seeds=verify.seeds,
        layer_index=layer_index,
        num_kv_heads=num_kv_heads,
        num_keys=num_keys,
    )


def _lane_groups(shape, lanes):
    groups = [
        LaneGroup(shape.draft_lanes, shape.draft_queries),
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
        pad(lanes.of_draft(lanes.draft_table)),
        full.at[lanes.verify.slots].get(mode="clip"),
        full.at[lanes.prefill_slots].get(mode="clip"),
    ]
    drafted = jnp.where(lanes.draft_active, lanes.draft_rows, 0)
    rows = [drafted, lanes.verify.num_rows, lanes.prefill_counts]
    return (
        jnp.concatenate(tables),
        jnp.concatenate([r.astype(jnp.int32) for r in rows]),
    )


def _kv_lengths(lanes, shape, counts):
    """Visible keys int32 [lanes, H or 1], from the selected rows `counts` [S, H or 1].

    A draft lane sees its selected rows, the tail behind them and its own rows.
    """
    tails = lanes.draft_tails + lanes.draft_rows
    draft = lanes.of_draft(counts) + tails[:, None]
    draft = jnp.where(lanes.draft_active[:, None], draft, 0)
    verify = lanes.verify.starts + lanes.verify.num_rows
    verify = jnp.where(lanes.verify.num_rows > 0, verify, 0)
    prefill = lanes.prefill_starts + lanes.prefill_counts
    prefill = jnp.where(lanes.prefill_counts > 0, prefill, 0)
    full = jnp.concatenate([verify, prefill])[:, None]
    return jnp.concatenate([draft, jnp.broadcast_to(full, (full.size, draft.shape[1]))])


def _row_places(lanes, shape, counts):
    """RowPlaces of the step's tokens, in lane order; counts [S, H or 1]."""
    row = jnp.arange(shape.draft_queries)[None, :, None]
    place = (lanes.of_draft(counts) + lanes.draft_tails[:, None])[:, None] + row
    is_fed = lanes.draft_active[:, None, None] & (row < lanes.draft_rows[:, None, None])
    place = jnp.where(is_fed, place, -1)
    table = lanes.of_draft(lanes.draft_table)
    verify = lanes.verify
    places = [
        _places(shape, table, place),
        _span(shape, lanes, verify.slots, verify.starts, verify.num_rows,
              shape.num_queries),
    ]  # fmt: skip
    if lanes.prefill_slots.size:
        places.append(
            _span(
                shape,
                lanes,
                lanes.prefill_slots,
                lanes.prefill_starts,
                lanes.prefill_counts,
                shape.prefill_chunk,
            )
        )
    return places


def _span(shape, lanes, slots, starts, counts, num_rows):
    """RowPlaces of positions starts.. of the slots' full tables, `num_rows` each."""
    row = jnp.arange(num_rows)[None]
    place = jnp.where(row < counts[:, None], starts[:, None] + row, -1)
    table = lanes.full_table.at[slots].get(mode="clip")
    return _places(shape, table, place[..., None])


def _tail_places(lanes, shape, selected):
    """RowPlaces of the verified rows in the draft caches, behind the selected ones."""
    verify = lanes.verify
    row = jnp.arange(shape.num_queries)[None, :, None]
    place = selected[:, None, :] + row
    place = jnp.where(row < verify.num_rows[:, None, None], place, -1)
    table = lanes.draft_table.at[verify.slots].get(mode="clip")
    return _places(shape, table, place)


def _places(shape, tables, places):
    """RowPlaces of cache indices `places` [lanes, n, H or 1] of tables [lanes, W].

    Rows with a negative place or no page are dropped.
    """
    lanes, num, heads = places.shape
    column = jnp.maximum(places, 0) // shape.page_size
    pages = jnp.take_along_axis(
        tables,
        column.reshape(lanes, num * heads),
        axis=1,
        mode="fill",
        fill_value=shape.num_pages,
    ).reshape(places.shape)
    pages = jnp.where((places >= 0) & (pages >= 0), pages, shape.num_pages)
    flat = (lanes * num, heads)
    return RowPlaces(pages.reshape(flat), (places % shape.page_size).reshape(flat))


def _concatenate(places):
    """RowPlaces of a list, one behind the other."""
    heads = max(place.pages.shape[1] for place in places)
    return RowPlaces(
        *(
            jnp.concatenate([jnp.broadcast_to(p, (p.shape[0], heads)) for p in field])
            for field in zip(*places, strict=True)
        )
    )


def _gather_selected(pools, indices, counts, lanes, impl):
    """Copy the selected rows of some layers to the head of their draft caches.

    indices [L, E, H, cap] and counts [L, E, H], or one list for all heads ([L, E, 1]).
    """
    slots = lanes.verify.slots
    source = lanes.full_table.at[slots].get(mode="clip")
    target = lanes.draft_table.at[slots].get(mode="clip")
    return gather_kv_layers(pools, source, target, indices, counts, impl=impl)

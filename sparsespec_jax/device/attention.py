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
from sparsespec_jax.device import per_step
from sparsespec_jax.device.row_places import concatenate, row_places, tail_places
from sparsespec_jax.device.state import read_rows
from sparsespec_jax.plan import StepShape
from sparsespec_jax.policies.base import SelectionOptions, SelectionView, run_policy


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
    step = _TracedStep(lanes, shape, policy, options, impl, num_layers)
    return step.attend, step.fill


class _TracedStep:
    """What the layers of a step share, and leave to each other, while it is traced."""

    def __init__(self, lanes, shape, policy, options, impl, num_layers):
        self.lanes, self.shape, self.policy = lanes, shape, policy
        self.impl, self.num_layers = impl, num_layers
        self.groups = _lane_groups(shape, lanes)
        self.tables, self.q_lengths = _tables_and_rows(lanes, shape)
        self.is_drafting = shape.draft_lanes > 0
        self.has_fixed_counts = lanes.draft_counts is not None
        self.mass_rows = policy.mass_rows(options.mass_rows)
        self.selection = SelectionOptions(
            cap=shape.max_budget,
            per_layer=options.scope == "layer",
            num_recent=options.num_recent,
            num_sinks=options.num_sinks,
            impl=impl,
        )
        first = shape.num_draft_rows
        self.verify_rows = slice(first, first + shape.verify_lanes * shape.num_queries)
        self.picked = None  # by the newest layer below that selects
        self.masses = []  # of layers that select, left to `fill`: some in each array

    def attend(self, layer_index, q, rows, cache):
        """See `make_attend`."""
        policy, rows = self.policy, rows.astype(cache.kv_pages.dtype)
        selects = (
            self.is_drafting and not policy.per_step and policy.is_anchor(layer_index)
        )
        counts = self._counts(cache)
        kv_pages = self._write(rows, cache.kv_pages, counts)
        out, mass = self._read(layer_index, q, kv_pages, counts, selects)
        if not self.is_drafting:
            return out, cache._replace(kv_pages=kv_pages)
        # Attention must be done with the pool before the draft caches are
        # filled: without this order XLA copies the pool, twice per layer.
        kv_pages, out = jax.lax.optimization_barrier((kv_pages, out))
        cache = cache._replace(kv_pages=kv_pages)
        if policy.layers_at_once:
            if selects:
                self.masses.append(mass)
            return out, cache
        if policy.per_step:
            self.picked = per_step.nothing(self.shape)
            out = per_step.attend_drafts(
                policy, self.selection, layer_index, q, out, kv_pages, self.lanes,
                self.shape,
            )  # fmt: skip
        if selects:
            cache = self._select(layer_index, q[self.verify_rows], mass, cache)
        return out, self._fill_layer(rows, cache)

    def _counts(self, cache):
        """Selected rows in the draft caches, int32 [S, H or 1]."""
        return self.lanes.draft_counts if self.has_fixed_counts else cache.draft_counts

    def _write(self, rows, kv_pages, counts):
        """The pool with the step's rows; verified ones in both caches if counts are
        fixed."""
        places = row_places(self.lanes, self.shape, counts)
        if self.is_drafting and self.has_fixed_counts:
            budgets = self.lanes.verify.budgets[:, None]
            places += [tail_places(self.lanes, self.shape, budgets)]
        with jax.named_scope("write_rows"):
            return write_rows(
                kv_pages, rows, *concatenate(places),
                copies_from=self.verify_rows.start, impl=self.impl,
            )  # fmt: skip

    def _read(self, layer_index, q, kv_pages, counts, selects):
        """Attention output [T, N, D], and the mass where the layer selects by it."""
        heads, policy = kv_pages.shape[1], self.policy
        buffer, place = None, 0
        if selects and policy.layers_at_once:
            buffer, place = self._mass_buffer(layer_index, heads)
        with jax.named_scope("attention"):
            lengths = _kv_lengths(self.lanes, self.shape, counts)
            return paged_attention(
                q,
                kv_pages,
                self.tables,
                jnp.broadcast_to(lengths, (self.q_lengths.size, heads)),
                self.q_lengths,
                groups=self.groups,
                # The verify lanes are behind the draft lanes.
                mass_group=1 if selects and policy.needs_mass else None,
                mass_rows=self.mass_rows,
                mass_buffer=buffer,
                mass_place=place,
                impl=self.impl,
            )

    def _mass_buffer(self, layer_index, heads):
        """The buffer [n, E, H, X] that a layer writes its mass to, and its place."""
        number = layer_index // self.policy.anchor_every
        size = _masses_at_once(self.policy, self.shape, heads)
        if number % size:
            return self.masses.pop(), number % size
        left = -(-self.num_layers // self.policy.anchor_every) - number
        num_keys = self.tables.shape[1] * self.shape.page_size
        lead = min(size, left), self.shape.verify_lanes, heads
        return jax.lax.empty((*lead, num_keys), jnp.float32), 0

    def _select(self, layer_index, queries, mass, cache):
        """Pick from a verification; the cache with what the policy remembers."""
        lanes = self.lanes
        view = _view(layer_index, queries, mass, cache, lanes, self.shape, self.policy)
        with jax.named_scope("select"):
            indices, counts, memory = run_policy(self.policy, view, self.selection)
        self.picked = indices, _of_live_lanes(lanes, counts)
        if memory is None:
            return cache
        put = cache.policy_state.at[lanes.verify.slots]
        return cache._replace(policy_state=put.set(memory, mode="drop"))

    def _fill_layer(self, rows, cache):
        """The cache with the picked rows in the draft caches, verified ones behind."""
        lanes, (_, selected) = self.lanes, self.picked
        with jax.named_scope("gather"):
            picks = (x[None] for x in self.picked)
            (kv_pages,) = _gather_selected((cache.kv_pages,), *picks, lanes, self.impl)
        if not self.has_fixed_counts:
            place = tail_places(lanes, self.shape, selected)
            kv_pages = write_rows(
                kv_pages, rows[self.verify_rows], *place, impl=self.impl
            )
            selected = jnp.broadcast_to(selected, (selected.shape[0], rows.shape[1]))
            put = cache.draft_counts.at[lanes.verify.slots]
            cache = cache._replace(draft_counts=put.set(selected, mode="drop"))
        return cache._replace(kv_pages=kv_pages)

    def fill(self, layers):
        """See `make_attend`."""
        filled, every = [], self.policy.anchor_every
        for mass in self.masses:
            with jax.named_scope("select"):
                picks = _select_together(
                    self.policy, self.selection, mass, self.lanes.verify
                )
            first, count = len(filled), len(mass) * every
            group = layers[first : first + count]
            if every > 1:
                picks = [jnp.repeat(x, every, axis=0)[: len(group)] for x in picks]
            with jax.named_scope("gather"):
                pools = tuple(cache.kv_pages for cache in group)
                pools = _gather_selected(pools, *picks, self.lanes, self.impl)
            filled += [
                cache._replace(kv_pages=pool)
                for cache, pool in zip(group, pools, strict=True)
            ]
        return filled or layers


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


def _gather_selected(pools, indices, counts, lanes, impl):
    """Copy the selected rows of some layers to the head of their draft caches.

    indices [L, E, H, cap] and counts [L, E, H], or one list for all heads ([L, E, 1]).
    """
    slots = lanes.verify.slots
    source = lanes.full_table.at[slots].get(mode="clip")
    target = lanes.draft_table.at[slots].get(mode="clip")
    return gather_kv_layers(pools, source, target, indices, counts, impl=impl)

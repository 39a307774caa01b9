"""Filling the draft caches behind a verification: one way for each kind of policy.

A filler says in which layers attention must give mass, and is called behind the
attention of every layer and once behind the last one. What the layers of a step leave
to each other lives in it while the step is traced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.code_keys import code_keys
from pallas_kernels.gather_kv import gather_kv_layers
from pallas_kernels.score_select import score_select
from pallas_kernels.write_rows import write_rows
from sparsespec_jax.array_types import (
    KvPages,
    MassOfLayers,
    Queries,
    RowsOfHeads,
    VerifyMass,
)
from sparsespec_jax.device import per_step
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.lanes import StepLanes, put, take, token_rows
from sparsespec_jax.device.row_places import tail_places
from sparsespec_jax.device.state import LayerCache, read_rows
from sparsespec_jax.policies.base import SelectionOptions, SelectionView, run_policy

_ROWS_AT_ONCE = 264  # that a GPU selects as fast as fewer
_LAYERS_AT_ONCE = 8

Layers = Sequence[LayerCache]


class Attended(NamedTuple):
    """What attention of a layer took and gave."""

    q: Queries
    out: Queries
    rows: RowsOfHeads
    mass: VerifyMass | MassOfLayers | None


def make_filler(context: StepContext, lanes: StepLanes):
    """The filler of a step for its policy."""
    is_draft_step = not context.shape.verify_lanes
    if context.policy.kind == "index":
        return FillByIndex(context, lanes)
    if not context.is_drafting or is_draft_step and not context.policy.per_step:
        return FillNothing()
    kinds = {"together": FillTogether, "layer": FillByLayer, "step": FillPerStep}
    return kinds[context.policy.kind](context, lanes)


class FillNothing:
    """No model drafts, so no cache is filled."""

    def selects(self, layer_index: int) -> bool:
        """True if the layer selects."""
        return False

    def mass_buffer(
        self, layer_index: int, kv_pages: KvPages
    ) -> tuple[MassOfLayers | None, int]:
        """The buffer (or None) that a layer writes its mass to, and its place."""
        return None, 0

    def before(self, q: Queries, cache: LayerCache) -> LayerCache:
        """The LayerCache that a layer's attention reads; new rows are in it already."""
        return cache

    def layer(
        self, layer_index: int, seen: Attended, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """(attention output, LayerCache) behind a layer's attention."""
        return seen.out, cache

    def finish(self, layers: Layers) -> Layers:
        """LayerCaches behind the last layer."""
        return layers


class _Filler(FillNothing):
    def __init__(self, context, lanes):
        self.context, self.shape, self.lanes = context, context.shape, lanes
        self.policy, self.impl = context.policy, context.impl
        options = context.options
        self.selection = SelectionOptions(
            cap=self.shape.max_budget,
            per_layer=options.scope == "layer",
            num_recent=options.num_recent,
            num_sinks=options.num_sinks,
            impl=self.impl,
            axis=context.axis,
        )

    def _after_attention(self, out, cache):
        """Attention must be done with the pool before the draft caches are filled.

        Without this order XLA copies the pool, twice per layer.
        """
        kv_pages, out = jax.lax.optimization_barrier((cache.kv_pages, out))
        return out, cache._replace(kv_pages=kv_pages)

    def _gather(self, pools, indices, counts, slots=None):
        """Copy the selected rows of some layers to the head of their draft caches.

        indices [L, E, H, cap] and counts [L, E, H], or one list for all heads
        ([L, E, 1]), of the verify lanes' slots unless others are given.
        """
        slots = self.lanes.verify.slots if slots is None else slots
        source = take(self.lanes.full_table, slots)
        target = take(self.lanes.draft_table, slots)
        return gather_kv_layers(pools, source, target, indices, counts, impl=self.impl)

    def _view_of_mass(self, layer_index, mass, verify, num_kv_heads):
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
            num_keys=self.shape.table_width * self.shape.page_size,
        )


class FillTogether(_Filler):
    """Policies by mass alone select for several layers in one call: fewer launches."""

    def __init__(self, context, lanes):
        super().__init__(context, lanes)
        self.masses = []  # of layers that select: some in each array

    def selects(self, layer_index: int) -> bool:
        """See FillNothing."""
        return self.policy.is_anchor(layer_index)

    def mass_buffer(
        self, layer_index: int, kv_pages: KvPages
    ) -> tuple[MassOfLayers | None, int]:
        """See FillNothing: one buffer for several layers."""
        if not self.selects(layer_index):
            return None, 0
        heads, shape = kv_pages.shape[1], self.shape
        number = layer_index // self.policy.anchor_every
        size = self._layers_at_once(heads)
        if number % size:
            return self.masses.pop(), number % size
        left = -(-self.context.model.num_layers // self.policy.anchor_every) - number
        num_keys = max(shape.table_width, shape.draft_table_width) * shape.page_size
        lead = min(size, left), shape.verify_lanes, heads
        return jax.lax.empty((*lead, num_keys), jnp.float32), 0

    def _layers_at_once(self, num_heads):
        rows, layers = self.shape.verify_lanes * num_heads, self.policy.anchor_every
        return max(1, min(_ROWS_AT_ONCE // rows, _LAYERS_AT_ONCE // layers))

    def layer(
        self, layer_index: int, seen: Attended, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """See FillNothing; the caches are left to `finish`."""
        if self.selects(layer_index):
            self.masses.append(seen.mass)
        return self._after_attention(seen.out, cache)

    def finish(self, layers: Layers) -> Layers:
        """See FillNothing: select for each buffer of masses, and copy."""
        filled, every = [], self.policy.anchor_every
        for mass in self.masses:
            with jax.named_scope("select"):
                picks = self._select(mass)
            first, count = len(filled), len(mass) * every
            group = layers[first : first + count]
            if every > 1:
                picks = [jnp.repeat(x, every, axis=0)[: len(group)] for x in picks]
            with jax.named_scope("gather"):
                pools = tuple(cache.kv_pages for cache in group)
                pools = self._gather(pools, *picks)
            filled += [
                cache._replace(kv_pages=pool)
                for cache, pool in zip(group, pools, strict=True)
            ]
        return filled

    def _select(self, masses):
        """Indices [L, E, ...] and counts of masses [L, E, H, X].

        Idle lanes have no candidates, so their counts are 0: they are fixed.
        """
        count, lanes, num_heads, num_keys = masses.shape
        verify = self.lanes.verify._replace(tokens=None)
        verify = jax.tree.map(lambda x: jnp.concatenate([x] * count), verify)
        mass = masses.reshape(count * lanes, num_heads, num_keys)
        view = self._view_of_mass(None, mass, verify, num_heads)
        view = view._replace(num_keys=num_keys)
        indices, counts, _ = run_policy(self.policy, view, self.selection)
        return [x.reshape(count, lanes, *x.shape[1:]) for x in (indices, counts)]


class FillByLayer(_Filler):
    """Policies that look at queries, keys or their memory select layer by layer."""

    picked = None  # by the newest layer below that selects

    def selects(self, layer_index: int) -> bool:
        """See FillNothing."""
        return self.policy.is_anchor(layer_index)

    def layer(
        self, layer_index: int, seen: Attended, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """See FillNothing."""
        out, cache = self._after_attention(seen.out, cache)
        if self.selects(layer_index):
            queries = seen.q[token_rows(self.shape).verify]
            cache = self._select(layer_index, queries, seen.mass, cache)
        return out, self._fill(seen.rows, cache)

    def _select(self, layer_index, queries, mass, cache):
        """Pick from a verification; the cache with what the policy remembers."""
        verify = self.lanes.verify
        view = self._view(layer_index, queries, mass, cache)
        with jax.named_scope("select"):
            indices, counts, memory = run_policy(self.policy, view, self.selection)
        is_live = (verify.num_rows > 0)[:, None]
        self.picked = indices, jnp.where(is_live, counts, 0)
        if memory is None:
            return cache
        memory = put(cache.policy_state, memory, verify.slots)
        return cache._replace(policy_state=memory)

    def _view(self, layer_index, queries, mass, cache):
        """The SelectionView of a layer's verification; queries [E * Q, N, D]."""
        verify, needs, shape = self.lanes.verify, self.policy.needs, self.shape
        size, num_keys = queries.shape[-1], shape.table_width * shape.page_size
        state = None
        if self.policy.state_shape:
            state = take(cache.policy_state, verify.slots)
            is_new = verify.is_seed.reshape(-1, *[1] * (state.ndim - 1))
            state = jnp.where(is_new, 0.0, state)

        def keys():
            table = take(self.lanes.full_table, verify.slots)
            used = jnp.arange(num_keys) < (verify.starts + verify.num_rows)[:, None]
            rows = read_rows(cache.kv_pages, table)[..., :size]
            return jnp.where(used[:, None, :, None], rows, 0)

        queries = queries.reshape(-1, shape.num_queries, *queries.shape[1:])
        num_heads = cache.kv_pages.shape[1]
        return self._view_of_mass(layer_index, mass, verify, num_heads)._replace(
            queries=queries if "queries" in needs else None,
            keys=keys if "keys" in needs else None,
            state=state,
        )

    def _fill(self, rows, cache):
        """The cache with the picked rows in the draft caches, verified ones behind."""
        lanes, (_, selected) = self.lanes, self.picked
        with jax.named_scope("gather"):
            picks = (x[None] for x in self.picked)
            (kv_pages,) = self._gather((cache.kv_pages,), *picks)
        if not self.policy.fixed_counts:
            place = tail_places(lanes, self.shape, selected)
            verified = rows[token_rows(self.shape).verify]
            kv_pages = write_rows(kv_pages, verified, *place, impl=self.impl)
            selected = jnp.broadcast_to(selected, (selected.shape[0], rows.shape[1]))
            counts = put(cache.draft_counts, selected, lanes.verify.slots)
            cache = cache._replace(draft_counts=counts)
        return cache._replace(kv_pages=kv_pages)


class FillPerStep(FillByLayer):
    """Policies that select before every draft step copy nothing but verified rows."""

    def selects(self, layer_index: int) -> bool:
        """See FillNothing."""
        return False

    def layer(
        self, layer_index: int, seen: Attended, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """See FillNothing; drafts attend to what the policy picks now."""
        out, cache = self._after_attention(seen.out, cache)
        if self.shape.draft_lanes:
            out = per_step.attend_drafts(
                self.context, self.selection, layer_index, seen.q, out, cache.kv_pages,
                self.lanes,
            )  # fmt: skip
        if not self.shape.verify_lanes:
            return out, cache
        self.picked = per_step.nothing(self.shape)
        return out, self._fill(seen.rows, cache)


class FillByIndex(_Filler):
    """Policies with a stored index pick before every draft step, and copy their picks.

    A draft lane's picks replace those of its last draft at the head of its draft cache.
    Codes follow behind attention: of the keys that were committed when a verification
    began, which are those that its drafts select among, and of prompt chunks; in steps
    of no drafts too, if the engine also has others.
    """

    def __init__(self, context, lanes):
        super().__init__(context, lanes)
        page_size, head_size = self.shape.page_size, context.model.head_dim
        self.layout = self.policy.index_layout(page_size, head_size)

    def before(self, q: Queries, cache: LayerCache) -> LayerCache:
        """See FillNothing: picks for this step's drafts."""
        # Of draft lanes beside all verifications of a cycle none drafts.
        if not self.shape.draft_lanes or self.shape.part == "verify":
            return cache
        draft = self.lanes.draft
        is_active, zero = draft.is_active, jnp.int32(0)
        with jax.named_scope("select"):
            picks = score_select(
                q,
                cache.codes,
                take(self.lanes.full_table, draft.slots),
                jnp.where(is_active, draft.starts, zero),
                jnp.where(is_active, draft.budgets, zero),
                layout=self.layout,
                cap=self.selection.cap,
                num_recent=self.selection.num_recent,
                impl=self.impl,
            )
        with jax.named_scope("gather"):
            lists = (x[None] for x in picks)
            (pool,) = self._gather((cache.kv_pages,), *lists, slots=draft.slots)
        return cache._replace(kv_pages=pool)

    def layer(
        self, layer_index: int, seen: Attended, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """See FillNothing; codes of committed keys."""
        verify, prefill, shape = self.lanes.verify, self.lanes.prefill, self.shape
        num_chunks = prefill.slots.size
        if cache.codes is None or not verify.slots.size + num_chunks:
            return seen.out, cache
        most = max(
            shape.most_committed * (verify.slots.size > 0),
            shape.prefill_chunk * (num_chunks > 0),
        )
        live = jnp.where(verify.num_rows > 0, verify.starts, 0)
        starts = jnp.maximum(live - shape.most_committed, 0), prefill.starts
        ends = live, prefill.starts + prefill.counts
        slots = jnp.concatenate([verify.slots, prefill.slots])
        with jax.named_scope("index"):
            codes = code_keys(
                cache.codes,
                cache.kv_pages,
                take(self.lanes.full_table, slots),
                jnp.concatenate(starts),
                jnp.concatenate(ends),
                layout=self.layout,
                most_keys=most,
                impl=self.impl,
            )
        return seen.out, cache._replace(codes=codes)

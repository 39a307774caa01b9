"""Attention of one mixed step: write KV rows, attend, fill the draft caches.

Binds pages, page tables and kernels of a step into the `attend` function that the model
calls in every layer. Each kind of lane (see `lanes`) is one group of a single
paged-attention call.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention import PIECE, LaneGroup, paged_attention
from pallas_kernels.write_rows import write_rows
from sparsespec_jax.array_types import Queries, RowsOfHeads
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.filling import Attended, make_filler
from sparsespec_jax.device.lanes import StepLanes, take, token_rows
from sparsespec_jax.device.row_places import concatenate, row_places, tail_places
from sparsespec_jax.device.state import LayerCache
from sparsespec_jax.plan.shape import StepShape


def make_attend(context: StepContext, lanes: StepLanes) -> tuple[Callable, Callable]:
    """The functions `attend(layer, q, rows, cache)` and `fill(layers)` of one step.

    `attend` takes q and rows (K then V; q and K rotated) and the layer's LayerCache to
    the attention output, like q, and the next LayerCache.
    With fixed counts all that depends on lengths is the same in every layer, and
    computed once. `fill` takes all LayerCaches after the last layer and fills the draft
    caches that a policy left to it; other policies fill them in `attend`.
    """
    filler = make_filler(context, lanes)
    return _Attention(context, lanes, filler).attend, filler.finish


class _Attention:
    """What the layers of a step share while it is traced."""

    def __init__(self, context, lanes, filler):
        self.context, self.shape = context, context.shape
        self.lanes, self.filler = lanes, filler
        piece = PIECE if context.exact else None
        chunks = lanes.prefill.slots.size
        self.groups = lane_groups(self.shape, piece=piece, num_chunks=chunks)
        self.tables, self.q_lengths = _tables_and_rows(lanes, self.shape)
        self.has_fixed_counts = lanes.draft_counts is not None
        self.mass_rows = context.policy.mass_rows(context.options.mass_rows)

    def attend(
        self, layer_index: int, q: Queries, rows: RowsOfHeads, cache: LayerCache
    ) -> tuple[Queries, LayerCache]:
        """See `make_attend`."""
        rows = rows.astype(cache.kv_pages.dtype)
        fixed = self.has_fixed_counts
        counts = self.lanes.draft_counts if fixed else cache.draft_counts
        kv_pages = self._write(rows, cache.kv_pages, counts)
        cache = self.filler.before(q, cache._replace(kv_pages=kv_pages))
        out, mass = self._read(layer_index, q, cache.kv_pages, counts)
        seen = Attended(q, out, rows, mass)
        return self.filler.layer(layer_index, seen, cache)

    def _write(self, rows, kv_pages, counts):
        """The pool with the step's rows; verified ones in both caches if counts are
        fixed."""
        places = row_places(self.lanes, self.shape, counts)
        if self.context.is_drafting and self.has_fixed_counts:
            budgets = self.lanes.verify.budgets[:, None]
            places += [tail_places(self.lanes, self.shape, budgets)]
        with jax.named_scope("write_rows"):
            return write_rows(
                kv_pages,
                rows,
                *concatenate(places),
                copies_from=token_rows(self.shape).verify.start,
                impl=self.context.impl,
            )

    def _read(self, layer_index, q, kv_pages, counts):
        """Attention output [T, N, D], and the mass where the layer selects by it."""
        heads, needs_mass = kv_pages.shape[1], self.context.policy.needs_mass
        gives_mass = needs_mass and self.filler.selects(layer_index)
        buffer, place = self.filler.mass_buffer(layer_index, kv_pages)
        with jax.named_scope("attention"):
            lengths = _kv_lengths(self.lanes, counts)
            return paged_attention(
                q,
                kv_pages,
                self.tables,
                jnp.broadcast_to(lengths, (self.q_lengths.size, heads)),
                self.q_lengths,
                groups=tuple(self.groups.values()),
                mass_group=list(self.groups).index("verify") if gives_mass else None,
                mass_rows=self.mass_rows,
                mass_buffer=buffer,
                mass_place=place,
                impl=self.context.impl,
            )


def lane_groups(
    shape: StepShape, *, piece: int | None, num_chunks: int
) -> dict:  # of LaneGroup
    """LaneGroups by the name of their lanes, in lane order; empty ones left out."""
    groups = {
        "draft": LaneGroup(shape.draft_lanes, shape.draft_queries),
        "verify": LaneGroup(shape.verify_lanes, shape.num_queries, piece),
        "prefill": LaneGroup(num_chunks, shape.prefill_chunk, piece),
    }
    return {name: group for name, group in groups.items() if group.num_lanes}


def _tables_and_rows(lanes, shape):
    """Page tables [lanes, W] and valid rows [lanes] of all groups, concatenated."""
    width = max(shape.table_width, shape.draft_table_width)

    def pad(table):
        missing = width - table.shape[1]
        return jnp.pad(table, ((0, 0), (0, missing)), constant_values=shape.num_pages)

    full = pad(lanes.full_table)
    tables = [
        pad(take(lanes.draft_table, lanes.draft.slots)),
        take(full, lanes.verify.slots),
        take(full, lanes.prefill.slots),
    ]
    drafted = jnp.where(lanes.draft.is_active, lanes.draft.num_rows, 0)
    rows = [drafted, lanes.verify.num_rows, lanes.prefill.counts]
    return (
        jnp.concatenate(tables),
        jnp.concatenate([r.astype(jnp.int32) for r in rows]),
    )


def _kv_lengths(lanes, counts):
    """Visible keys int32 [lanes, H or 1], from the selected rows `counts` [S, H or 1].

    A draft lane sees its selected rows, the tail behind them and its own rows.
    """
    tails = lanes.draft.tails + lanes.draft.num_rows
    draft = take(counts, lanes.draft.slots) + tails[:, None]
    draft = jnp.where(lanes.draft.is_active[:, None], draft, 0)
    verify = lanes.verify.starts + lanes.verify.num_rows
    verify = jnp.where(lanes.verify.num_rows > 0, verify, 0)
    prefill = lanes.prefill.starts + lanes.prefill.counts
    prefill = jnp.where(lanes.prefill.counts > 0, prefill, 0)
    full = jnp.concatenate([verify, prefill])[:, None]
    return jnp.concatenate([draft, jnp.broadcast_to(full, (full.size, draft.shape[1]))])

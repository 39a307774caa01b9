"""The lanes of a step: which token is whose, and where it reads and writes.

The token axis of a step is

    [ A drafts of Qd tokens | E verifies of Q tokens | F prompt chunks of C tokens ]

A lane names a slot. That of an idle lane is past the last one: what it reads is
arbitrary (`take`), what it writes is dropped (`put`, `add`).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsespec_jax import sampling
from sparsespec_jax.array_types import (
    Array,
    ChunkTokens,
    DraftFlags,
    DraftSeeds,
    DraftTable,
    FullTable,
    PerChunk,
    PerDraft,
    PerVerify,
    SameCounts,
    SlotParams,
    VerifyFlags,
    VerifySeeds,
    VerifyTokens,
)
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.plan.buffer import PENDING_ONLY
from sparsespec_jax.plan.shape import StepShape


def take(array: Array, *index) -> Array:
    """Entries of an array at `index`; of idle lanes, which lie outside, arbitrary."""
    return array.at[index].get(mode="clip")


def put(array: Array, values: Array | int | float, *index) -> Array:
    """The array with entries replaced, but for those of idle lanes."""
    return array.at[index].set(values, mode="drop")


def add(array: Array, values: Array, *index) -> Array:
    """The array with values added to entries, but for those of idle lanes."""
    return array.at[index].add(values, mode="drop")


class VerifyLanes(NamedTuple):
    """The verify lanes of a step; rows of an idle lane are dropped everywhere."""

    slots: PerVerify  # num_slots for an idle lane
    starts: PerVerify  # committed length before the verification
    num_rows: PerVerify  # valid rows (drafts + 1), 0 for an idle lane
    tokens: VerifyTokens  # pending token, then drafts
    seeds: VerifySeeds
    budgets: PerVerify  # tokens to select
    # The first of a request: its drafts are prompt tokens, known to be right.
    is_seed: VerifyFlags


class DraftLanes(NamedTuple):
    """The draft lanes of a step; none (A = 0) where nothing drafts."""

    slots: PerDraft  # num_slots for an idle lane
    is_active: DraftFlags
    num_rows: PerDraft  # tokens that an active lane feeds
    tails: PerDraft  # rows behind the selected ones, own one excluded
    seeds: DraftSeeds
    starts: PerDraft  # committed length before the last verification
    budgets: PerDraft


class PrefillLanes(NamedTuple):
    """The prompt chunks of a step; none (F = 0) in most."""

    slots: PerChunk  # num_slots for an idle lane
    starts: PerChunk
    counts: PerChunk  # valid tokens
    tokens: ChunkTokens


class StepLanes(NamedTuple):
    """All lanes of a step, and the tables by which they find their rows."""

    draft: DraftLanes
    verify: VerifyLanes
    prefill: PrefillLanes
    draft_counts: SameCounts | None  # if the policy's counts are fixed
    draft_table: DraftTable
    full_table: FullTable
    slot_params: SlotParams


class TokenRows(NamedTuple):
    """Where the lanes of each kind lie on the token axis."""

    draft: slice
    verify: slice
    prefill: slice


def token_rows(shape: StepShape) -> TokenRows:
    """TokenRows of a step."""
    drafts = shape.num_draft_rows
    verified = drafts + shape.verify_lanes * shape.num_queries
    return TokenRows(slice(drafts), slice(drafts, verified), slice(verified, None))


def make_lanes(context: StepContext, state: Any, plan: dict[str, Array]) -> StepLanes:
    """StepLanes of an unpacked plan over a DecodeState."""
    verify = _verify_lanes(context, state, plan)
    draft = _draft_lanes(context, state, plan)
    none = jnp.zeros(0, jnp.int32)
    no_tokens = np.zeros((0, context.shape.prefill_chunk), np.int32)
    return StepLanes(
        draft=draft,
        verify=verify,
        prefill=PrefillLanes(
            slots=plan.get("prefill_slots", none),
            starts=plan.get("prefill_starts", none),
            counts=plan.get("prefill_counts", none),
            tokens=plan.get("prefill_tokens", no_tokens),
        ),
        draft_counts=state.draft_counts,
        draft_table=state.draft_table,
        full_table=state.full_table,
        slot_params=plan["slot_params"],
    )


def _verify_lanes(context, state, plan):
    """What each verify lane feeds: a slot's drafts, or the prompt's tail."""
    shape, slots, counts = context.shape, plan["verify_slots"], plan["seed_counts"]
    is_seed = counts >= 0
    in_range = slots < shape.num_slots
    live = in_range & (is_seed | ~take(state.done, slots))
    drafted = jnp.where(counts == PENDING_ONLY, 0, take(state.num_drafted, slots))
    drafts = jnp.where(is_seed, counts, drafted)
    starts = jnp.where(is_seed, plan["seed_starts"], take(state.lengths, slots))
    tokens = take(state.tokens, slots)[:, : shape.num_queries]
    tokens = jnp.where(is_seed[:, None], plan["seed_tokens"], tokens)
    params = sampling.read_slot_params(take(plan["slot_params"], slots))
    starts = jnp.where(live, starts, 0)
    return VerifyLanes(
        slots=jnp.where(live, slots, shape.num_slots),
        starts=starts,
        num_rows=jnp.where(live, drafts + 1, 0),
        tokens=tokens,
        seeds=params.seed,
        budgets=_budgets(shape, params, starts),
        is_seed=is_seed & live,
    )


def _draft_lanes(context, state, plan):
    shape, slots = context.shape, plan["draft_slots"]
    active = (slots < shape.num_slots) & ~take(state.done, slots)
    drafted, tails = take(state.num_drafted, slots), take(state.draft_tails, slots)
    rows = jnp.ones_like(drafted)
    if shape.num_guesses:
        left = shape.num_draft_tokens - drafted
        active &= left > 0
        rows = jnp.minimum(left, shape.draft_queries)
    params = sampling.read_slot_params(take(plan["slot_params"], slots))
    starts = jnp.maximum(take(state.lengths, slots) - tails, 0)
    return DraftLanes(
        slots=slots,
        is_active=active,
        num_rows=rows,
        tails=tails + drafted,
        seeds=params.seed,
        starts=starts,
        budgets=_budgets(shape, params, starts),
    )


def _budgets(shape, params, lengths):
    """Tokens to select int32 [...] at `lengths`, by the requests' own budgets."""
    return shape.budget_tokens(
        lengths, ratio=params.budget_ratio, floor=params.min_budget, xp=jnp
    )

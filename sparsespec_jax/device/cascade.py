"""The lower level of a cascade in the compiled step: guesses, and what became of them.

A draft lane feeds its newest token and guesses of what follows (TriForce, arXiv
2404.11912, with prompt lookup as the smallest model). The model's own choices up to the
first missed guess are drafts; the KV rows of what was fed behind it lie past the end of
the draft cache, where the next draft step writes.
"""

import jax.numpy as jnp

from sparsespec_jax.array_types import (
    DraftsOfGuesses,
    DraftTokens,
    Guesses,
    PerDraft,
    VerifyCounters,
)
from sparsespec_jax.device.acceptance import count_prefix
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.lanes import DraftLanes, VerifyLanes, add, put, take
from sparsespec_jax.device.state import DecodeState


def guess(context: StepContext, state: DecodeState, lanes: DraftLanes) -> Guesses:
    """Guesses of what follows each draft lane's newest token, perhaps none."""
    shape = context.shape
    if not (context.is_drafting and shape.num_guesses):
        return jnp.zeros((shape.draft_lanes, shape.num_guesses), jnp.int32)
    known = take(state.lengths + state.num_drafted + 1, lanes.slots)
    history = take(state.history, lanes.slots)
    return context.proposer.guesser.propose(history, known, shape.num_guesses)


def num_kept(guesses: Guesses, drafts: DraftsOfGuesses, lanes: DraftLanes) -> PerDraft:
    """How many of the drafts stand.

    A row's draft counts only if the guesses up to its own token are the drafts.
    """
    hits = count_prefix(guesses == drafts[:, :-1], lanes.num_rows - 1)
    return jnp.where(lanes.is_active, hits + 1, 0)


def record(
    state: DecodeState, lanes: DraftLanes, drafts: DraftTokens, count: PerDraft
) -> DecodeState:
    """Put the first `count` of each lane's drafts in the histories, and count.

    `state` is that before the drafts join it.
    """
    slots, drafted = lanes.slots, take(state.num_drafted, lanes.slots)
    row = jnp.arange(drafts.shape[1])[None]
    newest = take(state.lengths, slots) + drafted
    place = jnp.where(
        row < count[:, None], newest[:, None] + 1 + row, state.history.shape[1]
    )
    rows = lanes.num_rows
    seen = jnp.stack([jnp.ones_like(rows), rows - 1, drafted + rows], axis=1)
    seen = jnp.where(lanes.is_active[:, None], seen, 0)
    return state._replace(
        history=put(state.history, drafts, slots[:, None], place),
        cascade_counts=add(state.cascade_counts, seen, slots),
    )


def counts(state: DecodeState, lanes: VerifyLanes) -> VerifyCounters:
    """CascadeCounts of the verified slots as columns."""
    found = take(state.cascade_counts, lanes.slots)
    drafts = jnp.maximum(lanes.num_rows - 1, 0)[:, None]
    return jnp.concatenate([drafts, found], axis=1)

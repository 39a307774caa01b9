"""The lower level of a cascade in the compiled step: guesses, and what became of them.

A draft lane feeds its newest token and guesses of what follows (TriForce, arXiv
2404.11912, with prompt lookup as the smallest model). The model's own choices up to the
first missed guess are drafts; the KV rows of what was fed behind it lie past the end of
the draft cache, where the next draft step writes.
"""

import jax.numpy as jnp

from sparsespec_jax.device.acceptance import count_prefix


def guess(state, lanes, shape, proposer):
    """Guesses int32 [A, m] of what follows each lane's newest token; m may be 0."""
    if not (shape.draft_lanes and shape.num_guesses):
        return jnp.zeros((shape.draft_lanes, shape.num_guesses), jnp.int32)
    known = lanes.of_draft(state.lengths + state.num_drafted + 1)
    history = lanes.of_draft(state.history)
    return proposer.guesser.propose(history, known, shape.num_guesses)


def num_kept(guesses, drafts, lanes):
    """How many int32 [A] of `drafts` [A, Qd] stand; `lanes` are StepLanes.

    A row's draft counts only if the guesses up to its own token are the drafts.
    """
    hits = count_prefix(guesses == drafts[:, :-1], lanes.draft_rows - 1)
    return jnp.where(lanes.draft_active, hits + 1, 0)


def record(state, lanes, drafts, count):
    """Put the first `count` [A] of `drafts` [A, Qd] in the histories, and count.

    `state` is that before the drafts join it.
    """
    slots, drafted = lanes.draft_slots, lanes.of_draft(state.num_drafted)
    row = jnp.arange(drafts.shape[1])[None]
    newest = lanes.of_draft(state.lengths) + drafted
    place = jnp.where(
        row < count[:, None], newest[:, None] + 1 + row, state.history.shape[1]
    )
    rows = lanes.draft_rows
    seen = jnp.stack([jnp.ones_like(rows), rows - 1, drafted + rows], axis=1)
    seen = jnp.where(lanes.draft_active[:, None], seen, 0)
    return state._replace(
        history=state.history.at[slots[:, None], place].set(drafts, mode="drop"),
        cascade_counts=state.cascade_counts.at[slots].add(seen, mode="drop"),
    )


def report(state, lanes, header):
    """The state with counts of the verified slots at 0, and `header` with them behind.

    Adds the columns of plan.CascadeCounts; `lanes` are VerifyLanes.
    """
    slots, counts = lanes.slots, state.cascade_counts
    found = counts.at[slots].get(mode="clip")
    drafts = jnp.maximum(lanes.num_rows - 1, 0)[:, None]
    state = state._replace(cascade_counts=counts.at[slots].set(0, mode="drop"))
    return state, jnp.concatenate([header, drafts, found], axis=1)

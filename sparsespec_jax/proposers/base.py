"""Drafts from something other than the model's own sparse attention.

A proposer is any hashable object with `propose(history, lengths, num_drafts)`: from the
token ids int32 [E, X] of E requests, of which the first `lengths` [E] are known, it
returns the drafts int32 [E, num_drafts] that follow. It runs inside the compiled step,
right after acceptance, so every request is verified in every step. Any proposal is
lossless; the draft law is a single token each.

One that remembers has `init_memory(shape)`, a pytree kept in the device state, weights
included, and instead `propose_from(view, memory, num_drafts)`, which returns (drafts,
memory) from a `ProposalView`; `feature_layers` names the streams that it reads.

A `Cascade` is no proposer in that sense: the model drafts with its sparse attention
and checks a few tokens of its `guesser`, an object with `propose`, in every draft step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsespec_jax.config import put_int


class ProposalView(NamedTuple):
    """What a proposer that remembers sees after a verification; E lanes."""

    slots: jax.Array  # int32 [E], num_slots for an idle lane
    starts: jax.Array  # int32 [E], committed length before
    num_rows: jax.Array  # int32 [E], rows verified, rejected ones included
    is_seed: jax.Array  # bool [E], first verification of a request
    lengths: jax.Array  # int32 [E], committed length now; the pending token's position
    history: jax.Array  # int32 [E, X], token ids up to the pending one
    features: jax.Array | None  # [E, Q, n * hidden] of `feature_layers`
    params: Any  # the model's


@dataclasses.dataclass(frozen=True)
class NGram:
    """Prompt lookup: what followed an earlier occurrence of the newest tokens.

    The longest suffix of at most `max_match` tokens that occurs before wins; of equally
    long ones, the earliest. Without one of `min_match` tokens the newest is repeated.
    The defaults are those used against SparseSpec (n from 1 to 7).

    Raises:
      ValueError: not 1 <= min_match <= max_match.
    """

    min_match: int = 1
    max_match: int = 7

    def __post_init__(self):
        put_int(self, "min_match", 1)
        put_int(self, "max_match", 1)
        if self.min_match > self.max_match:
            raise ValueError(
                f"min_match ({self.min_match}) must be at most max_match "
                f"({self.max_match})"
            )

    def propose(self, history, lengths, num_drafts):
        """See the module; reads max_match + num_drafts times the history."""
        place = jnp.arange(history.shape[1])[None]
        last = lengths[:, None] - 1
        run = jnp.zeros(history.shape, jnp.int32)
        matches = jnp.ones(history.shape, bool)
        for back in range(self.max_match):
            moved = jnp.roll(history, back, axis=1)
            newest = jnp.take_along_axis(history, jnp.maximum(last - back, 0), axis=1)
            matches &= (moved == newest) & (place >= back)
            run += matches
        # An occurrence ends before the newest token.
        run = jnp.where((place < last) & (run >= self.min_match), run, 0)
        end = jnp.argmax(run, axis=1)[:, None]
        found = jnp.take_along_axis(run, end, axis=1) > 0
        end = jnp.where(found, end, last)
        # Past the known tokens, the stretch since the occurrence repeats itself.
        step = jnp.arange(num_drafts)[None] % jnp.maximum(last - end, 1)
        source = jnp.where(found, end + 1 + step, last)
        return jnp.take_along_axis(history, jnp.maximum(source, 0), axis=1)


@dataclasses.dataclass(frozen=True)
class Cascade:
    """Two levels of drafting (TriForce, arXiv 2404.11912).

    In a draft step the model feeds its newest token and `num_guesses` tokens of the
    guesser, attends to its sparse cache, and keeps its own choices up to the first that
    a guess misses. Drafts are thus those of sparse self-speculation, in fewer steps:
    `draft_steps` of them, with at most `num_draft_tokens` drafts, then a verification.
    """

    guesser: Any = NGram()


PROPOSERS = {"ngram": NGram(), "cascade": Cascade()}


def resolve_proposer(proposer):
    """The proposer named or given, None for "self"; ValueError for an unknown one."""
    if proposer == "self":
        return None
    if isinstance(proposer, str):
        if proposer not in PROPOSERS:
            raise ValueError(
                f"proposer must be 'self', one of {tuple(PROPOSERS)} or an object with "
                f"a propose function, got {proposer!r}"
            )
        return PROPOSERS[proposer]
    name = "propose_from" if hasattr(proposer, "init_memory") else "propose"
    if not callable(getattr(getattr(proposer, "guesser", proposer), name, None)):
        raise ValueError(f"proposer has no {name} function: {proposer!r}")
    return proposer


def keep_history(state, plan, lanes, tokens, shape):
    """Put the tokens of verifications and prompt chunks [E * Q (+ F * C)] in histories.

    The pending token of a verified slot comes behind them.
    """
    verify_rows = shape.verify_lanes * shape.num_queries
    groups = [(lanes.slots, lanes.starts, lanes.num_rows, tokens[:verify_rows])]
    if tokens.size > verify_rows:
        names = ("prefill_slots", "prefill_starts", "prefill_counts")
        groups.append((*(plan[name] for name in names), tokens[verify_rows:]))
    history = state.history
    for slots, starts, counts, ids in groups:
        ids = ids.reshape(slots.size, -1)
        row = jnp.arange(ids.shape[1])[None]
        place = jnp.where(
            row < counts[:, None], starts[:, None] + row, history.shape[1]
        )
        history = history.at[slots[:, None], place].set(ids, mode="drop")
    slots = lanes.slots
    known = state.lengths.at[slots].get(mode="clip")
    pending = state.tokens.at[slots, 0].get(mode="clip")
    return state._replace(history=history.at[slots, known].set(pending, mode="drop"))


def propose(state, plan, lanes, tokens, features, params, shape, proposer):
    """Keep the step's tokens [T] in the histories and draft for the verified slots."""
    state = keep_history(state, plan, lanes, tokens, shape)
    slots, history, count = lanes.slots, state.history, shape.num_draft_tokens
    verify_rows = shape.verify_lanes * shape.num_queries
    known = state.lengths.at[slots].get(mode="clip")
    texts = history.at[slots].get(mode="clip")
    memory = state.proposer_memory
    if memory is None:
        drafts = proposer.propose(texts, known + 1, count)
    else:
        if features is not None:
            features = features[:verify_rows].reshape(*slots.shape, count + 1, -1)
        view = ProposalView(
            slots, lanes.starts, lanes.num_rows, lanes.is_seed, known, texts,
            features, params,
        )  # fmt: skip
        drafts, memory = proposer.propose_from(view, memory, count)
    law = state.draft_law
    if law.token_ids.size:  # the ratio test: all of the draft's law on one token
        ids = law.token_ids.at[slots, :count, 0].set(drafts, mode="drop")
        law = law._replace(
            token_ids=ids, probs=law.probs.at[slots, :count, 0].set(1.0, mode="drop")
        )
    return state._replace(
        proposer_memory=memory,
        draft_law=law,
        tokens=state.tokens.at[slots, 1 : count + 1].set(drafts, mode="drop"),
        num_drafted=state.num_drafted.at[slots].set(count, mode="drop"),
    )

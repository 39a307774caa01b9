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
        if not 1 <= self.min_match <= self.max_match:
            raise ValueError(
                f"min_match ({self.min_match}) must be at least 1 and at most "
                f"max_match ({self.max_match})"
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

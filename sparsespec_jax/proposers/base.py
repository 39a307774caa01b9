"""Drafts from something other than the model's own sparse attention.

A proposer is any hashable object that is a `Proposer` or a `RememberingProposer`. It
runs inside the compiled step, right after acceptance, so every request is verified in
every step. Any proposal is lossless; the draft law is a single token each.

A `Cascade` is none: the model drafts with its sparse attention and checks a few tokens
of its `guesser`, a Proposer, in every draft step.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from sparsespec_jax.array_types import (
    PerLane,
    PerVerify,
    Proposed,
    Texts,
    VerifyFlags,
    ViewFeatures,
    ViewTexts,
)
from sparsespec_jax.models.option_fields import put_int
from sparsespec_jax.plan.shape import StepShape


class ProposalView(NamedTuple):
    """What a proposer that remembers sees after a verification; E lanes."""

    slots: PerVerify  # num_slots for an idle lane
    starts: PerVerify  # committed length before
    num_rows: PerVerify  # rows verified, rejected ones included
    is_seed: VerifyFlags  # first verification of a request
    lengths: PerVerify  # committed length now; the pending token's position
    history: ViewTexts  # token ids up to the pending one
    features: ViewFeatures | None  # of `feature_layers`, side by side
    params: Any  # the model's


@runtime_checkable
class Proposer(Protocol):
    """Drafts from the tokens alone."""

    def propose(self, history: Texts, lengths: PerLane, num_drafts: int) -> Proposed:
        """Drafts of texts of which `lengths` tokens are known."""


@runtime_checkable
class RememberingProposer(Protocol):
    """Drafts from a ProposalView and from what it keeps in the device state."""

    feature_layers: tuple[int, ...]  # whose streams it reads

    def init_memory(self, shape: StepShape) -> Any:
        """What is kept between steps of a StepShape: a pytree, weights included."""

    def propose_from(
        self, view: ProposalView, memory: Any, num_drafts: int
    ) -> tuple[Proposed, Any]:
        """(drafts, memory) after a verification."""


@dataclasses.dataclass(frozen=True)
class FromTexts:
    """A Proposer in the form of a RememberingProposer that keeps nothing."""

    proposer: Proposer
    feature_layers: tuple[int, ...] = ()

    def init_memory(self, shape: StepShape) -> None:
        """Nothing."""

    def propose_from(
        self, view: ProposalView, memory: Any, num_drafts: int
    ) -> tuple[Proposed, Any]:
        """See RememberingProposer."""
        known = view.lengths + 1  # the pending token included
        return self.proposer.propose(view.history, known, num_drafts), memory


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

    def propose(self, history: Texts, lengths: PerLane, num_drafts: int) -> Proposed:
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


def resolve_proposer(proposer: Any) -> Any:
    """None for "self", a Cascade, or a RememberingProposer.

    Raises:
      ValueError: an unknown name, or an object without the functions.
    """
    if isinstance(proposer, str):
        if proposer != "self" and proposer not in PROPOSERS:
            raise ValueError(
                f"proposer must be 'self', one of {tuple(PROPOSERS)} or an object with "
                f"a propose function, got {proposer!r}"
            )
        proposer = PROPOSERS.get(proposer)
    if proposer is None or isinstance(proposer, RememberingProposer):
        return proposer
    if isinstance(proposer, Proposer):
        return FromTexts(proposer)
    if isinstance(proposer, Cascade) and isinstance(proposer.guesser, Proposer):
        return proposer
    raise ValueError(
        f"proposer has no propose function: {proposer!r} (one that remembers has "
        "feature_layers, init_memory and propose_from instead)"
    )

"""Verified logits to committed tokens: three acceptors with one interface.

`shared_noise` compares each draft with the target's own choice under the same noise,
so the text equals plain decoding token by token. `ratio_test` is the classical
rejection test (Leviathan et al., 2023; Chen et al., 2023): the same law, another
random stream, and a little more acceptance. `forced` is a tool of measurement and
not exact: it accepts drafts whatever the target says.
"""

from typing import NamedTuple

import jax.numpy as jnp

from sparsespec_jax import sampling
from sparsespec_jax.array_types import (
    KeptIds,
    KeptProbs,
    LaneFlags,
    Logits,
    PerLane,
    PerVerify,
    RowInts,
    VerifyDrafts,
    VerifyScores,
    VerifyTokens,
)
from sparsespec_jax.models.collectives import summed_in_order
from sparsespec_jax.models.vocabulary import (
    likeliest,
    place_of,
    scores_of,
    token_ids,
    top_tokens,
)


class DraftLaw(NamedTuple):
    """What the ratio test must know of each draft: its own top-m law."""

    token_ids: KeptIds
    probs: KeptProbs  # of a draft they sum to 1


class Verified(NamedTuple):
    """Outcome of one verification per lane."""

    num_accepted: PerVerify
    tokens: VerifyTokens  # row i is the token at position L + i + 1


def shared_noise(
    logits: VerifyScores,
    laws: sampling.Law,
    positions: VerifyTokens,
    drafts: VerifyDrafts,
    num_drafts: PerVerify,
    *,
    filters: bool,
    exact: bool = False,
    axis: str | None = None,
) -> Verified:
    """Accept drafts while they equal the target's choice.

    laws: of E * Q rows; positions: of the tokens to choose. Row i of the result is the
    target's choice given that the drafts before it hold. `exact`, `axis`: see
    `sampling`.
    """
    lanes, rows, vocab = logits.shape
    choice = sampling.choose(
        logits.reshape(-1, vocab),
        laws,
        positions.reshape(-1),
        filters=filters,
        exact=exact,
        axis=axis,
    ).reshape(lanes, rows)
    agrees = drafts == choice[:, :-1]
    return Verified(count_prefix(agrees, num_drafts), choice)


def forced(
    logits: VerifyScores,
    laws: sampling.Law,
    positions: VerifyTokens,
    drafts: VerifyDrafts,
    num_drafts: PerVerify,
    *,
    probability: float,
    filters: bool,
    axis: str | None = None,
) -> Verified:
    """Accept every draft with `probability`, unseen: for timing random weights.

    As `shared_noise`, but the text is the drafts' and not the target's.
    """
    lanes, rows, _ = logits.shape
    choice = shared_noise(
        logits, laws, positions, drafts, num_drafts, filters=filters, axis=axis
    ).tokens
    u = sampling.uniform(
        laws.seed, positions.reshape(-1), stream=sampling.ACCEPT
    ).reshape(lanes, rows)
    accepted = count_prefix(u[:, :-1] < probability, num_drafts)
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    is_draft = jnp.arange(rows)[None] < accepted[:, None]
    return Verified(accepted, jnp.where(is_draft, padded, choice))


def ratio_test(
    logits: VerifyScores,
    laws: sampling.Law,
    positions: VerifyTokens,
    drafts: VerifyDrafts,
    num_drafts: PerVerify,
    draft_law: DraftLaw,
    *,
    filters: bool,
    axis: str | None = None,
) -> Verified:
    """Accept draft d with probability min(1, p(d) / q(d)), else draw from (p - q)+.

    As `shared_noise`, with the law of each draft. Rows before the first
    rejection hold the drafts; that row holds the residual's draw, or the target's
    own choice when every draft was accepted.
    """
    lanes, rows, vocab = logits.shape
    flat = logits.reshape(-1, vocab)
    probs = sampling.probabilities(flat, laws, filters=filters, axis=axis)
    probs = probs.reshape(lanes, rows, vocab)
    p_draft = scores_of(probs[:, :-1], drafts[..., None], axis)[..., 0]
    is_draft = draft_law.token_ids == drafts[..., None]
    q_draft = jnp.where(is_draft, draft_law.probs, 0.0).sum(-1)
    u = sampling.uniform(
        laws.seed, positions.reshape(-1), stream=sampling.ACCEPT
    ).reshape(lanes, rows)
    accepted = count_prefix(u[:, :-1] * q_draft < p_draft, num_drafts)

    lane = jnp.arange(lanes)
    p_stop = probs[lane, accepted]  # [E, V], the law at the first row not accepted
    place = jnp.minimum(accepted, drafts.shape[1] - 1)
    rejected = (accepted < num_drafts)[:, None]
    q_probs = jnp.where(rejected, draft_law.probs[lane, place], 0.0)
    q_stop = jnp.zeros_like(p_stop)
    q_stop = q_stop.at[
        lane[:, None], place_of(draft_law.token_ids[lane, place], vocab, axis)
    ].add(q_probs)
    residual = jnp.maximum(p_stop - q_stop, 0.0)
    # Rounding can leave nothing of the residual; the law is then p itself.
    left = summed_in_order(residual.sum(-1, keepdims=True), axis)
    residual = jnp.where(left > 0, residual, p_stop)
    row_seed = laws.seed.reshape(lanes, rows, 2)[:, 0]
    noise = sampling.gumbel(
        row_seed,
        positions[lane, accepted],
        token_ids(vocab, axis),
        stream=sampling.RESIDUAL,
    )
    drawn = likeliest(jnp.log(residual) + noise, axis).astype(jnp.int32)
    padded = jnp.pad(drafts, ((0, 0), (0, 1)))
    is_stop = jnp.arange(rows)[None] == accepted[:, None]
    return Verified(accepted, jnp.where(is_stop, drawn[:, None], padded))


def draft_from_top_m(
    logits: Logits,
    laws: sampling.Law,
    positions: RowInts,
    *,
    num_kept: int,
    filters: bool,
    axis: str | None = None,
) -> tuple[RowInts, DraftLaw]:
    """Draw drafts from the law cut to its `num_kept` likeliest tokens.

    The cut law is the one the ratio test uses, so nothing else of the draft is stored.
    """
    probs = sampling.probabilities(logits, laws, filters=filters, axis=axis)
    top, kept = top_tokens(probs, num_kept, axis)
    top = top / top.sum(-1, keepdims=True)
    noise = sampling.gumbel(laws.seed, positions, kept, stream=sampling.DRAFT)
    pick = jnp.argmax(jnp.log(top) + noise, -1)[:, None]
    tokens = jnp.take_along_axis(kept, pick, -1)[:, 0].astype(jnp.int32)
    return tokens, DraftLaw(kept.astype(jnp.int32), top)


def count_prefix(agrees: LaneFlags, num_drafts: PerLane) -> PerLane:
    """Length of the true prefix of each row of `agrees`, at most `num_drafts`."""
    inside = jnp.arange(agrees.shape[1])[None] < num_drafts[:, None]
    return jnp.cumprod((agrees & inside).astype(jnp.int32), axis=1).sum(axis=1)

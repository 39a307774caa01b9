"""Drafts of a proposer in the compiled step: texts that it reads, drafts it gives."""

from typing import Any

import jax.numpy as jnp

from sparsespec_jax.array_types import Features, PerToken
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.lanes import StepLanes, put, take, token_rows
from sparsespec_jax.device.state import DecodeState
from sparsespec_jax.proposers.base import ProposalView


def keep_history(
    context: StepContext, state: DecodeState, lanes: StepLanes, tokens: PerToken
) -> DecodeState:
    """Put the tokens of verifications and prompt chunks in the histories.

    The pending token of a verified slot comes behind them.
    """
    rows, verify, prefill = token_rows(context.shape), lanes.verify, lanes.prefill
    chunk, fed = tokens[rows.prefill], tokens[rows.verify]
    history = state.history
    for slots, starts, counts, ids in (
        (verify.slots, verify.starts, verify.num_rows, fed),
        (prefill.slots, prefill.starts, prefill.counts, chunk),
    ):
        if not slots.size:
            continue
        ids = ids.reshape(slots.size, -1)
        row = jnp.arange(ids.shape[1])[None]
        place = jnp.where(
            row < counts[:, None], starts[:, None] + row, history.shape[1]
        )
        history = put(history, ids, slots[:, None], place)
    known = take(state.lengths, verify.slots)
    pending = take(state.tokens, verify.slots, 0)
    return state._replace(history=put(history, pending, verify.slots, known))


def propose(
    context: StepContext,
    state: DecodeState,
    lanes: StepLanes,
    tokens: PerToken,
    features: Features | None,
    params: dict[str, Any],
) -> DecodeState:
    """Keep the step's tokens in the histories and draft for the verified slots."""
    state = keep_history(context, state, lanes, tokens)
    shape, verify = context.shape, lanes.verify
    slots, count = verify.slots, shape.num_draft_tokens
    known = take(state.lengths, slots)
    texts = take(state.history, slots)
    if features is not None:
        features = features[token_rows(shape).verify]
        features = features.reshape(*slots.shape, count + 1, -1)
    view = ProposalView(
        slots, verify.starts, verify.num_rows, verify.is_seed, known, texts, features,
        params,
    )  # fmt: skip
    proposed = context.proposer.propose_from(view, state.proposer_memory, count)
    drafts, memory = proposed
    law = state.draft_law
    if law.token_ids.size:  # the ratio test: all of the draft's law on one token
        place = slots, slice(count), 0
        law = law._replace(
            token_ids=put(law.token_ids, drafts, *place),
            probs=put(law.probs, 1.0, *place),
        )
    return state._replace(
        proposer_memory=memory,
        draft_law=law,
        tokens=put(state.tokens, drafts, slots, slice(1, count + 1)),
        num_drafted=put(state.num_drafted, count, slots),
    )

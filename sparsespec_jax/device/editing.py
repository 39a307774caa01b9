"""Logits changed by what a request has said before: biases, penalties, bad words.

The law of a position depends on the tokens before it, drafts included. So each row of a
verification is edited by the output up to and with its own token: what the slot had
emitted before the verification, which the state keeps, and the drafts of the rows
before. Drafting rows are edited alike, which decides how many drafts are accepted.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax.array_types import (
    LaneTokens,
    Logits,
    PerLane,
    PerVerify,
    RowCounts,
    SlotBiases,
    SlotLengths,
    SlotPenalties,
    SlotRecent,
    SlotTokenCounts,
    SlotTokenFlags,
    SlotWordEnds,
    SlotWordStarts,
    VerifyTokens,
)
from sparsespec_jax.device.lanes import VerifyLanes, add, put, take
from sparsespec_jax.models.vocabulary import place_of
from sparsespec_jax.plan.edits import ANY_TOKEN, StepExtras, neutral_arrays
from sparsespec_jax.plan.slot_params import NO_TOKEN


class SlotEdits(NamedTuple):
    """The arrays of all slots (`plan/edits.py`); None for what no request uses.

    `counts` and `recent` hold the output up to and with the pending token.
    """

    penalties: SlotPenalties  # presence, frequency, repetition
    lengths: SlotLengths  # tokens of the prompt, and from how many on it may end
    bias: SlotBiases | None = None
    ends: SlotTokenFlags | None = None  # held back until then
    counts: SlotTokenCounts | None = None  # in the output
    in_prompt: SlotTokenFlags | None = None
    word_starts: SlotWordStarts | None = None  # all but the last token, at the right
    word_ends: SlotWordEnds | None = None  # the last token; V if there is no word
    recent: SlotRecent | None = None  # last tokens of the output, NO_TOKEN before it


def slot_edits(
    extras: StepExtras, num_slots: int, vocab_size: int, old: Any
) -> SlotEdits:
    """SlotEdits of the sizes of `extras`, with what `old`, smaller or None, holds."""

    def grown(name, neutral):
        array = jnp.tile(jnp.asarray(neutral), (num_slots,) + (1,) * neutral.ndim)
        kept = None if old is None else getattr(old, name)
        if kept is None:
            return array
        # Words stand first in their list, and their tokens at the right.
        size, width = kept.shape[1:2], kept.shape[-1]
        if name == "word_starts":
            return array.at[:, : size[0], array.shape[-1] - width :].set(kept)
        if name == "recent":
            return array.at[:, array.shape[-1] - width :].set(kept)
        return array.at[:, :width].set(kept)

    arrays = neutral_arrays(extras, vocab_size)
    return SlotEdits(**{name: grown(name, value) for name, value in arrays.items()})


def put_slot(edits: SlotEdits, slot: Any, arrays: Any) -> SlotEdits:
    """The arrays of all slots with those of one (a SlotEdits without slots) put in."""
    return jax.tree.map(lambda old, new: old.at[slot].set(new), edits, arrays)


_loaded = jax.jit(put_slot, donate_argnums=0)


def load_slot(
    edits: SlotEdits, slot: int, arrays: dict[str, Any], load: Callable = _loaded
) -> SlotEdits:
    """The arrays of all slots with those of one replaced (`plan.edits.edit_arrays`).

    load: a compiled `put_slot`.
    """
    return load(edits, np.int32(slot), SlotEdits(**arrays))


def edit(
    edits: SlotEdits,
    scores: Logits,
    slots: PerLane,
    starts: PerLane,
    after: LaneTokens,
    included: RowCounts,
    *,
    axis: str | None = None,
) -> Logits:
    """Logits of the rows of lanes, edited by the output before each.

    Args:
      scores: of all rows, lane by lane.
      slots: of the lanes; idle ones lie outside.
      starts: position of each lane's pending token, which the state has counted.
      after: tokens behind it.
      included: how many of these each row's context has.
      axis: of the mesh that cuts the vocabulary, see `sampling`.
    """
    lanes, rows = included.shape
    own = jax.tree.map(lambda array: take(array, slots), edits)
    vocab = scores.shape[-1]
    x = scores.reshape(lanes, rows, vocab)
    output = _output_only(own, starts, after)
    if own.bias is not None:
        x = x + own.bias[:, None]
        length = starts[:, None] + included + 1
        held_back = length < own.lengths[:, 1:]
        x = jnp.where(held_back[..., None] & own.ends[:, None], -jnp.inf, x)
    if own.word_ends is not None:
        x = _without_bad_words(own, x, output, included, axis)
    if own.counts is not None:
        x = _penalised(own, x, _counts(own, output, included, vocab, axis))
    return x.reshape(scores.shape)


def _output_only(own, starts, after):
    """The tokens behind a lane's pending one, NO_TOKEN where they are prompt."""
    place = starts[:, None] + 1 + jnp.arange(after.shape[1])[None]
    return jnp.where(place >= own.lengths[:, :1], after, NO_TOKEN)


def _counts(own, output, included, vocab, axis):
    """How often each token is in the output before each row, int32 [lanes, rows, V]."""
    lanes, rows = included.shape
    counts = jnp.broadcast_to(own.counts[:, None], (lanes, rows, vocab))
    token = jnp.arange(output.shape[1])
    is_before = token < included[..., None]
    found = jnp.where(output == NO_TOKEN, vocab, place_of(output, vocab, axis))[:, None]
    found = jnp.where(is_before, found, vocab)  # past the last one: dropped
    lane, row = jnp.arange(lanes)[:, None, None], jnp.arange(rows)[None, :, None]
    return add(counts, jnp.ones_like(found), lane, row, found)


def _penalised(own, x, counts):
    presence, frequency, repetition = jnp.moveaxis(own.penalties, 1, 0)[..., None, None]
    seen = (counts > 0) | own.in_prompt[:, None]
    x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
    by_count = frequency * counts.astype(x.dtype)
    by_presence = jnp.where(counts > 0, presence, 0.0)
    # Whether a product is rounded before it is added to depends on what is fused, and
    # that on the number of rows: here it always is.
    x, by_count = jax.lax.optimization_barrier((x, by_count))
    return x - by_count - by_presence


def _without_bad_words(own, x, output, included, axis):
    """Exclude the last token of each bad word whose others the output ends in."""
    window = own.recent.shape[1]
    known = jnp.concatenate([own.recent, output], axis=1)
    place = included[..., None] + jnp.arange(window)
    before = known[jnp.arange(known.shape[0])[:, None, None], place]
    starts = own.word_starts[:, None]
    fits = (starts == ANY_TOKEN) | (starts == before[:, :, None])
    lanes, rows, vocab = x.shape
    ends = place_of(own.word_ends, vocab, axis)
    last = jnp.where(fits.all(-1), ends[:, None], vocab)  # V: dropped
    lane, row = jnp.arange(lanes)[:, None, None], jnp.arange(rows)[None, :, None]
    return put(x, -jnp.inf, lane, row, last)


def advance(
    edits: SlotEdits,
    verify: VerifyLanes,
    tokens: VerifyTokens,
    accepted: PerVerify,
    *,
    axis: str | None = None,
) -> SlotEdits:
    """The arrays, with what verifications committed: `accepted` + 1 of `tokens`."""
    slots = verify.slots
    own = jax.tree.map(lambda array: take(array, slots), edits)
    output = _output_only(own, verify.starts, tokens)
    if edits.counts is not None:
        is_new = jnp.arange(tokens.shape[1])[None] <= accepted[:, None]
        vocab = edits.counts.shape[1]
        place = place_of(output, vocab, axis)
        new = jnp.where(is_new & (output != NO_TOKEN), place, vocab)
        edits = edits._replace(
            counts=add(edits.counts, jnp.ones_like(new), slots[:, None], new)
        )
    if edits.recent is not None:
        known = jnp.concatenate([own.recent, output], axis=1)
        place = accepted[:, None] + 1 + jnp.arange(own.recent.shape[1])[None]
        recent = jnp.take_along_axis(known, place, 1)
        edits = edits._replace(recent=put(edits.recent, recent, slots))
    return edits

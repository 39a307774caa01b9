"""What the model says of the tokens of prompts, beside what a step does anyway.

Raw by definition: of the model's logits, whatever the law. Rows of prompt chunks have
no logits in other steps; those of verifications have, and a seed verify feeds the last
tokens of a prompt.
"""

from typing import Any

import jax
import jax.numpy as jnp

from sparsespec_jax import sampling
from sparsespec_jax.array_types import (
    Logits,
    Stream,
    ToldLogprobs,
    ToldTopIds,
    ToldTopLogprobs,
)
from sparsespec_jax.device.context import StepContext
from sparsespec_jax.device.lanes import StepLanes
from sparsespec_jax.models.transformer import logits


def tell(
    context: StepContext,
    params: dict[str, Any],
    lanes: StepLanes,
    hidden: Stream,
    verified: Logits,
) -> tuple[ToldLogprobs, ToldTopIds, ToldTopLogprobs]:
    """The fields of a PromptTold of all rows of verifications, then of prompt chunks.

    Args:
      hidden: normed states of the tokens of prompt chunks, the last rows of a step's.
      verified: logits of verified rows.
    """
    found = [_told(context, verified, _next(lanes.verify.tokens))]
    if hidden.shape[0]:
        # One lane after the other: the logits of all need not be there at once.
        # The token behind a chunk's last one stands behind it in the plan.
        chunks = lanes.prefill.tokens
        rows = hidden.reshape(*chunks.shape, -1), _next(chunks).reshape(chunks.shape)

        def of_lane(lane):
            scores = logits(context.model, params, lane[0], exact=context.exact)
            return _told(context, scores, lane[1])

        told = jax.lax.map(of_lane, rows)
        found.append([x.reshape(chunks.size, *x.shape[2:]) for x in told])
    return tuple(map(jnp.concatenate, zip(*found, strict=True)))


def _next(tokens):
    """The token behind each one of a lane, int32 [rows]; of its last one, none."""
    return jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))).ravel()


def _told(context, scores, tokens):
    top = context.extras.prompt_logprobs - 1
    law = _raw_law(len(tokens))
    how = dict(filters=False, exact=context.exact, axis=context.axis)
    own = sampling.logprobs(scores, law, tokens, **how)
    best = sampling.top_logprobs(scores, law, top, **how)
    return own, *best


def _raw_law(rows):
    ints, ones = jnp.zeros(rows, jnp.int32), jnp.ones(rows, jnp.float32)
    seed = jnp.zeros((rows, 2), jnp.uint32)
    return sampling.Law(seed, ones, ints, ones, 0 * ones, jnp.zeros(rows, bool))

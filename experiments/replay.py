"""Policies judged on identical queries: a recorded dense text, replayed cycle by cycle.

The text is fixed and every verification accepts all drafts, so policies differ only in
what they select: the keys of a cycle are chosen at its verification and judged by the
dense queries of the next k tokens, by

* recall: share of the attention on candidate keys [0, L) that falls on the selection
  (the tokens of the last verification, always visible, are not counted);
* the same for oracles of equal count: chosen for each query and KV head, for each query
  head, or for the mean of the next k queries (hindsight);
* overlap: the sum over tokens of min(p, q), p the dense law and q the law of a draft
  that sees only the selection. It is the chance that an exact test accepts a draft.

On-policy figures differ, because there drafts follow their own tokens.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsespec_jax.models import transformer as model_lib
from sparsespec_jax.plan.shape import budget_tokens
from sparsespec_jax.policies.base import (
    SelectionOptions,
    SelectionView,
    as_mask,
    run_policy,
)

HINDSIGHT = "hindsight"  # selects by the mean mass of the next k queries
_EXACT = dict(precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


class Recording(NamedTuple):
    """A dense run over a text of X tokens; rows are its last R positions."""

    keys: jax.Array  # [L, H, X, D], rotated
    values: jax.Array  # [L, H, X, D]
    queries: jax.Array  # [L, R, N, D]
    logits: jax.Array  # float32 [R, V]
    tokens: jax.Array  # int32 [R]
    first: jax.Array  # int32, position of row 0


@functools.partial(jax.jit, static_argnames=("config", "num_rows"))
def record_text(config, params, tokens, first, *, num_rows):
    """Recording of tokens int32 [X] (padding behind the text does no harm)."""

    def attend(layer_index, q, rows, cache):
        del layer_index, cache
        k, v = jnp.split(rows, 2, axis=-1)
        queries = jax.lax.dynamic_slice_in_dim(q, first, num_rows)
        kept = k.swapaxes(0, 1), v.swapaxes(0, 1), queries
        return _attend_by_block(q, k, v), kept

    positions = jnp.arange(tokens.size)
    caches = (None,) * config.num_layers
    hidden, layers = model_lib.forward(
        config, params, tokens, positions, attend, caches
    )
    keys, values, queries = (jnp.stack(part) for part in zip(*layers, strict=True))
    tail = jax.lax.dynamic_slice_in_dim(hidden, first, num_rows)
    rows = jax.lax.dynamic_slice_in_dim(tokens, first, num_rows)
    scores = model_lib.logits(config, params, tail)
    return Recording(keys, values, queries, scores, rows, jnp.int32(first))


def _attend_by_block(q, k, v):
    """Causal attention of one text, a block of queries at a time: long texts fit."""
    num_tokens, num_heads, size = q.shape
    block = next(b for b in (256, num_tokens) if num_tokens % b == 0)
    blocks = q.reshape(-1, block, k.shape[1], num_heads // k.shape[1], size)
    column = jnp.arange(num_tokens)

    def one(args):
        first, query = args
        logits = jnp.einsum("qhgd,khd->hgqk", query, k, **_EXACT) * size**-0.5
        visible = column[None] <= first + jnp.arange(block)[:, None]
        weights = jax.nn.softmax(jnp.where(visible, logits, -1e30), -1)
        return jnp.einsum("hgqk,khd->qhgd", weights, v, **_EXACT)

    starts = jnp.arange(0, num_tokens, block)
    return jax.lax.map(one, (starts, blocks)).reshape(q.shape).astype(q.dtype)


def attention_rows(recording, row, count):
    """Dense attention [L, H, G, count, X] of `count` recorded rows from `row` on."""
    queries = jax.lax.dynamic_slice_in_dim(recording.queries, row, count, 1)
    layers, _, num_heads, size = queries.shape
    heads, num_keys = recording.keys.shape[1:3]
    queries = queries.reshape(layers, count, heads, num_heads // heads, size)
    logits = jnp.einsum("lqhgd,lhkd->lhgqk", queries, recording.keys, **_EXACT)
    position = recording.first + row + jnp.arange(count)
    visible = jnp.arange(num_keys)[None] <= position[:, None]
    return jax.nn.softmax(jnp.where(visible, logits * size**-0.5, -1e30), -1)


def _view(recording, row, count, mass, start, budget, state, is_first):
    """A SelectionView whose lanes are the layers; `start` bounds the candidates."""
    layers, heads, num_keys, _ = recording.keys.shape
    candidate = jnp.arange(num_keys) < start

    def lanes(value):
        return jnp.full(layers, value, jnp.int32)

    return SelectionView(
        mass=jnp.where(candidate, mass, 0.0),
        queries=jax.lax.dynamic_slice_in_dim(recording.queries, row, count, 1),
        keys=lambda: jnp.where(candidate[:, None], recording.keys, 0),
        num_queries=lanes(count),
        lengths=lanes(start),
        budgets=lanes(budget),
        is_first=jnp.broadcast_to(is_first, layers),
        state=state,
        # What tells layers apart where a policy draws: each lane is a layer.
        seeds=jnp.stack([jnp.arange(layers), jnp.zeros(layers)], 1).astype(jnp.uint32),
        layer_index=0,
        num_kv_heads=heads,
        num_keys=num_keys,
    )


@functools.partial(jax.jit, static_argnames=("policy", "options"))
def select_keys(recording, row, budget, carry, *, policy, options):
    """(mask [k or 1, L, H, X], counts [k or 1, L, H], state) for the next k drafts."""
    k = options.num_draft_tokens
    state, is_first = carry
    start = recording.first + row
    heads = recording.keys.shape[1]
    selection = options.selection

    def as_result(view, indices, counts):
        if policy.anchor_every > 1:
            layer = jnp.arange(indices.shape[0])
            anchor = layer // policy.anchor_every * policy.anchor_every
            indices, counts = indices[anchor], counts[anchor]
        mask = as_mask(view, indices, counts)
        mask = jnp.broadcast_to(mask, (mask.shape[0], heads, mask.shape[2]))
        return mask, jnp.broadcast_to(counts, mask.shape[:2])

    if policy.per_step:

        def one(draft_row):
            mass = attention_rows(recording, draft_row, 1)[:, :, :, 0].mean(2)
            view = _view(recording, draft_row, 1, mass, start, budget, None, is_first)
            return as_result(view, *policy.select(view, selection))

        mask, counts = jax.lax.map(one, row + k + 1 + jnp.arange(k))
        return mask, counts, state
    probabilities = attention_rows(recording, row, k + 1)
    if options.hindsight:
        probabilities = attention_rows(recording, row + k + 1, k)
    elif policy.mass_rows(options.mass_rows) == "edges":
        probabilities = probabilities[:, :, :, jnp.array([0, k])]
    mass = probabilities.mean((2, 3))
    view = _view(recording, row, k + 1, mass, start, budget, state, is_first)
    indices, counts, state = run_policy(policy, view, selection)
    mask, counts = as_result(view, indices, counts)
    return mask[None], counts[None], state


class ReplayOptions(NamedTuple):
    """Static options of a replay."""

    num_draft_tokens: int
    mass_rows: str
    selection: SelectionOptions
    hindsight: bool


def _mass_of_top(sums, counts):
    """The entries `counts - 1` of cumulative sums over the last axis; 0 for none."""
    place = jnp.maximum(counts - 1, 0)[..., None]
    best = jnp.take_along_axis(sums, place, -1)[..., 0]
    return jnp.where(counts > 0, best, 0.0)


def _recalls(recording, row, k, mask, counts, start, cap):
    """Recall of the selection and of the oracles, by name, each [L, H, k]."""
    probability = attention_rows(recording, row + k + 1, k)  # [L, H, G, k, X]
    candidate = jnp.arange(probability.shape[-1]) < start
    old = jnp.where(candidate, probability, 0.0)
    group = old.mean(2)
    total = jnp.maximum(group.sum(-1), 1e-9)
    chosen, counts = mask.transpose(1, 2, 0, 3), counts.transpose(1, 2, 0)
    _, later = jax.lax.top_k(group.mean(2), cap)  # of all drafts together
    later = jnp.take_along_axis(group, later[:, :, None], -1)

    def top(values):
        return jax.lax.top_k(values, cap)[0].cumsum(-1)

    by_query_head = _mass_of_top(
        top(old), jnp.broadcast_to(counts[:, :, None], old.shape[:4])
    )
    return {
        "recall": jnp.where(chosen, group, 0.0).sum(-1) / total,
        "recall_oracle": _mass_of_top(top(group), counts) / total,
        "recall_query_head_oracle": by_query_head.mean(2) / total,
        "recall_hindsight": _mass_of_top(later.cumsum(-1), counts) / total,
        "candidate_mass": total,
    }


def _draft_logits(config, params, recording, row, k, mask, start):
    """Logits [k, V] of drafts that see the selection and all from `start` on.

    The drafts' own rows come from their sparse attention, as in the engine; their
    tokens are the text's.
    """
    position = recording.first + row + k + 1 + jnp.arange(k)
    tokens = jax.lax.dynamic_slice_in_dim(recording.tokens, row + k + 1, k)
    column = jnp.arange(recording.keys.shape[2])
    tail = (column >= start) & (column < position[0])
    own = jnp.tril(jnp.ones((k, k), bool))

    def attend(layer_index, q, rows, cache):
        k_new, v_new = jnp.split(rows, 2, axis=-1)
        heads, size = k_new.shape[1:]
        query = q.reshape(k, heads, -1, size)
        keys = jnp.concatenate([recording.keys[layer_index], k_new.swapaxes(0, 1)], 1)
        values = jnp.concatenate(
            [recording.values[layer_index], v_new.swapaxes(0, 1)], 1
        )
        seen = mask[:, layer_index] | tail  # [k, H, X]
        seen = jnp.concatenate(
            [seen, jnp.broadcast_to(own[:, None], (k, heads, k))], -1
        )
        logits = jnp.einsum("qhgd,hkd->qhgk", query, keys, **_EXACT) * size**-0.5
        weights = jax.nn.softmax(jnp.where(seen[:, :, None], logits, -1e30), -1)
        out = jnp.einsum("qhgk,hkd->qhgd", weights, values, **_EXACT)
        return out.reshape(q.shape).astype(q.dtype), cache

    caches = (None,) * config.num_layers
    hidden, _ = model_lib.forward(config, params, tokens, position, attend, caches)
    return model_lib.logits(config, params, hidden)


def _law(logits, temperature):
    if temperature == 0:
        return jax.nn.one_hot(jnp.argmax(logits, -1), logits.shape[-1])
    return jax.nn.softmax(logits / temperature, -1)


@functools.partial(jax.jit, static_argnames=("config", "k", "cap", "temperatures"))
def judge_keys(
    config, params, recording, row, mask, counts, old, *, k, cap, temperatures
):  # fmt: skip
    """Measures of one cycle whose verification starts at `row`; `old`: the last mask.

    `cap`: most keys that a set has. Compiled once for all policies of a budget: it
    holds the model, a policy's selection does not.
    """
    start = recording.first + row
    measures = _recalls(recording, row, k, mask, counts, start, cap)
    drafts = _draft_logits(config, params, recording, row, k, mask, start)
    dense = jax.lax.dynamic_slice_in_dim(recording.logits, row + k + 1, k)
    laws = [(_law(dense, heat), _law(drafts, heat)) for heat in temperatures]
    measures["overlap"] = jnp.stack([jnp.minimum(p, q).sum(-1) for p, q in laws])
    measures["agreement"] = (jnp.argmax(dense, -1) == jnp.argmax(drafts, -1)) * 1.0
    both, either = (mask[0] & old).sum(-1), (mask[0] | old).sum(-1)
    measures["jaccard"] = both / jnp.maximum(either, 1)
    new = (mask[0] & ~old).sum(-1)
    measures["churn"] = new / jnp.maximum(mask[0].sum(-1), 1)
    measures["count"] = counts.astype(jnp.float32)
    return measures


def replay(
    model, recording, *, policy, options, speculation, temperatures, num_cycles
):  # fmt: skip
    """Measures of a text, numpy by name; leading axis: cycles.

    "overlap" is [cycles, temperatures, k]; nothing else depends on a temperature.
    """
    config, k = model.config, options.num_draft_tokens
    layers, heads, num_keys, _ = recording.keys.shape
    state = None
    if policy.state_shape:
        state = jnp.zeros((layers, *policy.state_shape(heads, num_keys)))
    mask = jnp.zeros((layers, heads, num_keys), bool)
    cycles = []
    for cycle in range(num_cycles):
        row = cycle * (k + 1)
        budget = budget_tokens(
            int(recording.first) + row,
            ratio=speculation.budget_ratio,
            floor=speculation.min_budget,
            cap=options.selection.cap,
        )
        chosen, counts, state = select_keys(
            recording, row, int(budget), (state, jnp.asarray(cycle == 0)),
            policy=policy, options=options,
        )  # fmt: skip
        # One shape for all policies: those that choose for each draft have k sets.
        chosen = jnp.broadcast_to(chosen, (k, *chosen.shape[1:]))
        counts = jnp.broadcast_to(counts, (k, *counts.shape[1:]))
        measures = judge_keys(
            config, model.params, recording, row, chosen, counts, mask,
            k=k, cap=options.selection.cap, temperatures=temperatures,
        )  # fmt: skip
        mask = chosen[0]
        cycles.append(measures)
    cycles = jax.device_get(cycles)
    found = jax.tree.map(lambda *parts: np.stack(parts), *cycles)
    for name in ("jaccard", "churn"):  # nothing comes before the first set
        found[name] = found[name][1:]
    return found


def rows_needed(num_cycles, num_draft_tokens):
    """Rows R of a recording for so many cycles: their tokens and the drafts behind."""
    return num_cycles * (num_draft_tokens + 1) + num_draft_tokens


def summarise(found, place=0):
    """Scalars of one text: means, the worst tenth of the heads, acceptance expected.

    `place` is that of the temperature among those of `replay`.
    """
    found = found | {"overlap": found["overlap"][:, place]}
    mean = {name: float(value.mean()) for name, value in found.items()}
    by_head = found["recall"].mean((0, -1)).ravel()
    overlap = found["overlap"].mean(0)
    agreement = found["agreement"].mean(0)
    return mean | {
        "recall_p10_head": float(np.quantile(by_head, 0.1)),
        "recall_of_oracle": mean["recall"] / mean["recall_oracle"],
        "overlap_by_position": overlap.tolist(),
        "expected_accepted": float(np.cumprod(found["overlap"], -1).sum(-1).mean()),
        "agreement_by_position": agreement.tolist(),
    }

"""Acceptance and traffic of decoded contexts, with intervals over contexts."""

from __future__ import annotations

import math

import numpy as np

from sparsespec_jax.models.transformer import params_dtype

_RESAMPLES = 2000
_RANGES = ((500, 1000), (1000, 2000), (2000, 4000), (4000, 8192))
# Named only if there is a context: not every model reads so far.
_OTHERS = ((0, 500), (8192, 16_384), (16_384, 24_576), (24_576, 32_768))
_OTHERS += ((32_768, 1 << 20),)


def mean_and_error(values):
    """Mean, standard error and 95 % bootstrap interval over contexts; None of none."""
    values = np.array([v for v in values if not math.isnan(v)], float)
    if not values.size:
        return None
    spread = values.std(ddof=1) if values.size > 1 else 0.0
    draws = np.random.default_rng(0).integers(0, values.size, (_RESAMPLES, values.size))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return {
        "mean": float(values.mean()),
        "standard_error": float(spread / math.sqrt(values.size)),
        "interval": [float(low), float(high)],
        "num_contexts": int(values.size),
    }


def conditional_acceptance(metrics):
    """[k]: chance that draft i is accepted if all before it are; None if none were."""
    reached = [metrics.num_verify_steps, *metrics.accepted_at_position[:-1]]
    return [
        hit / all_ if all_ else None
        for hit, all_ in zip(metrics.accepted_at_position, reached, strict=True)
    ]


def kv_bits(model):
    """Bits of one value in the model's KV cache, which has the type of its weights."""
    return 8 * params_dtype(model.params).itemsize


def score_share(policy, *, num_rows, group_size, head_dim, kv_bits):
    """KV caches' worth that scoring moves per verification, besides attention.

    Mass writes and reads one logit per (row, query head, key) in the type of the KV;
    a policy that needs keys reads K once more. Anchored policies score in every n-th
    layer only. Per-step policies read K in each draft step (num_rows - 1 of them), or
    their index, whose size is the same for K and V of any type (`kv_bits` a value).
    """
    share = 0.0
    if "keys" in policy.needs:
        share = 0.5
    elif "edge_mass" in policy.needs:
        share = min(2, num_rows) * group_size / head_dim
    elif "mass" in policy.needs:
        share = num_rows * group_size / head_dim
    if policy.per_step:
        read = 0.5
        if policy.index_bits is not None:
            read = policy.index_bits / (2 * kv_bits * head_dim)
        return read * (num_rows - 1)
    return share / policy.anchor_every


def summarise(results, lengths, *, policy, model):
    """One row's figures over contexts of the given lengths, in all and by range."""
    accepted = [r.metrics.mean_accepted_draft_tokens for r in results]
    total = sum((r.metrics for r in results[1:]), start=results[0].metrics)
    others = [r for r in _OTHERS if any(r[0] <= n < r[1] for n in lengths)]
    by_range = {
        f"{low}-{high}": mean_and_error(
            [a for a, n in zip(accepted, lengths, strict=True) if low <= n < high]
        )
        for low, high in (*_RANGES, *others)
    }
    share = 0.0
    if total.kv_tokens_read.gather:  # a draft cache was filled: something selected
        share = score_share(
            policy,
            num_rows=total.max_draft_tokens + 1,
            group_size=model.config.group_size,
            head_dim=model.config.head_dim,
            kv_bits=kv_bits(model),
        )
    reads = total.kv_tokens_read
    moved = reads.decode
    if policy.per_step:  # reads its picks where they lie
        moved -= 2 * reads.gather
    committed = mean_and_error([a + 1 for a in accepted])
    scored = (moved + share * reads.verify) / max(1, total.plain_kv_tokens)
    return {
        "mean_accepted_draft_tokens": mean_and_error(accepted),
        "committed_tokens_per_cycle": committed,
        "by_context_length": by_range,
        "acceptance_at_position": total.acceptance_at_position,
        "conditional_acceptance": conditional_acceptance(total),
        "accepted_histogram": total.accepted_histogram,
        "steps_per_cycle": total.steps_per_cycle,
        "guess_hit_rate": total.guess_hit_rate if total.num_guesses else None,
        "kv_read_ratio": moved / max(1, total.plain_kv_tokens),
        "score_share": share,
        "kv_read_ratio_with_scores": scored,
    }

"""Drafting policies: which committed tokens a draft reads until the next verification.

A policy is data (what it needs of the verification) and one pure function from a
`SelectionView` to positions. Any selection is lossless; it only moves acceptance. The
tokens verified last are always in the draft cache, whatever the policy says.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.select_tokens import select_tokens
from sparsespec_jax import sampling


class SelectionView(NamedTuple):
    """What a policy sees of one layer's verification; E lanes, H KV heads."""

    mass: jax.Array | None  # float32 [E, H, X], None unless the policy asks for it
    lengths: jax.Array  # int32 [E], candidates are positions [0, length)
    budgets: jax.Array  # int32 [E], tokens to select, <= cap
    seeds: jax.Array  # uint32 [E, 2], request seeds
    layer_index: int
    num_kv_heads: int
    num_keys: int  # X, static columns of a full table times the page size


class SelectionOptions(NamedTuple):
    """Static options of a selection, from SpeculationConfig."""

    cap: int
    per_layer: bool
    num_recent: int
    num_sinks: int
    impl: str


@dataclasses.dataclass(frozen=True)
class Policy:
    """A drafting policy.

    `select(view, options)` returns (indices int32 [E, H, cap], counts int32 [E, H]):
    distinct positions below `view.lengths`, at most `view.budgets` of them. One set
    for all heads may be given as [E, 1, cap] and [E, 1], which copies longer rows.
    `fixed_counts` promises counts of exactly min(budget, length) in every layer and
    head, which lets a step compute lengths and places once instead of in each layer.
    """

    name: str
    needs_mass: bool
    select: Callable
    fixed_counts: bool = False


def top_mass(view, options):
    """PillarAttn (arXiv 2512.01278, section 4.1): the keys of largest mass."""
    indices, counts = select_tokens(
        view.mass,
        view.lengths,
        view.budgets,
        cap=options.cap,
        num_recent=options.num_recent,
        per_layer=options.per_layer,
        impl=options.impl,
    )
    return (indices[:, :1], counts[:, :1]) if options.per_layer else (indices, counts)


def window(view, options):
    """Attention sinks and the newest tokens (StreamingLLM, as MagicDec drafts)."""
    counts = jnp.minimum(view.budgets, view.lengths)
    sinks = jnp.minimum(options.num_sinks, counts)[:, None]
    place = jnp.arange(options.cap)[None]
    recent = view.lengths[:, None] - counts[:, None] + place
    indices = jnp.where(place < sinks, place, recent).astype(jnp.int32)
    return indices[:, None], counts[:, None]


def everything(view, options):
    """The first tokens: at budget ratio 1 the dense draft, a probe of the loop."""
    counts = jnp.minimum(view.budgets, view.lengths)
    place = jnp.arange(options.cap, dtype=jnp.int32)[None, None]
    return jnp.broadcast_to(place, (counts.size, 1, options.cap)), counts[:, None]


def random(view, options):
    """Uniformly random positions, the floor of every comparison."""
    keys = jnp.arange(view.num_keys)
    salt = view.lengths * 64 + view.layer_index
    noise = sampling.gumbel(view.seeds, salt, keys, stream=sampling.DRAFT)
    scores = jnp.broadcast_to(
        noise[:, None], (noise.shape[0], view.num_kv_heads, view.num_keys)
    )
    return select_tokens(
        scores, view.lengths, view.budgets, cap=options.cap, impl=options.impl
    )


POLICIES = {
    "pillar": Policy("pillar", True, top_mass, True),
    "window": Policy("window", False, window, True),
    "full": Policy("full", False, everything, True),
    "random": Policy("random", False, random, True),
}


def resolve_policy(policy):
    """The Policy named or given; ValueError for an unknown name."""
    if isinstance(policy, Policy):
        return policy
    if policy not in POLICIES:
        raise ValueError(
            f"policy must be one of {tuple(POLICIES)} or a selection.Policy, "
            f"got {policy!r}"
        )
    return POLICIES[policy]

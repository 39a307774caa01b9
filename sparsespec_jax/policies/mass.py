"""Policies that score keys by the attention mass of verifications, as one family.

PillarAttn takes the mass of the last verification; the others change which rows count,
how earlier verifications count, how many tokens are kept, or who shares a set.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from sparsespec_jax.array_types import KeyScores, VerifyMass
from sparsespec_jax.models.option_fields import put_choice, put_flag, put_float, put_int
from sparsespec_jax.policies.base import (
    Policy,
    SelectionView,
    as_mask,
    candidates,
    top_tokens,
)

ROWS = ("config", "edges", "last")
SCOPES = ("config", "kv_head", "layer")
_FORCED = 1e6  # above any sum of masses
_WIDEN_SPAN = 9  # keys that share the mass of one


@dataclasses.dataclass(frozen=True, kw_only=True)
class MassOptions:
    """Switches of a mass policy; the defaults are PillarAttn's.

    Raises:
      ValueError: a switch out of range, naming it.
    """

    rows: str = "config"  # whose mass: as SpeculationConfig says, "edges" or "last"
    scope: str = "config"  # one set per "kv_head" or per "layer"
    top_p: float = 1.0  # smallest set with this share of the mass, within the budget
    decay: float = 0.0  # weight of the remembered mass; 1 accumulates for ever
    window: int = 1  # verifications whose masses are summed
    frozen: bool = False  # the first selection's mass for good
    max_churn: float = 1.0  # share of the budget that may be replaced at a time
    widen: float = 0.0  # each key also gets widen**d of the mass of the key d before
    smooth: int = 1  # width of an average over neighbouring keys
    recent_share: float = 0.0  # share of the budget for the newest tokens

    def __post_init__(self):
        put_choice(self, "rows", ROWS)
        put_choice(self, "scope", SCOPES)
        put_float(self, "top_p", 0.0, 1.0, open_low=True)
        for name in ("decay", "max_churn", "widen", "recent_share"):
            put_float(self, name, 0.0, 1.0)
        put_int(self, "window", 1)
        put_int(self, "smooth", 1)
        put_flag(self, "frozen")
        if self.widen == 1:
            raise ValueError("widen must be below 1, got 1.0")
        if self.smooth % 2 == 0:
            raise ValueError(f"smooth must be odd, got {self.smooth}")
        if (self.decay > 0) + (self.window > 1) + self.frozen > 1:
            raise ValueError("decay, window and frozen exclude each other")
        if self.top_p < 1 and self.recent_share > 0:
            raise ValueError("top_p and recent_share exclude each other")

    @property
    def remembers(self):
        """Remembered arrays [H, X]: masses, then membership if churn is limited."""
        masses = self.window - 1 if self.window > 1 else self.frozen or self.decay > 0
        return int(masses) + (self.max_churn < 1)


@functools.cache
def mass_policy(
    name: str, *, anchor_every: int = 1, per_step: bool = False, **switches
) -> Policy:
    """A Policy of the family; equal arguments give the same object.

    Raises:
      ValueError: see MassOptions and Policy.
    """
    mass = MassOptions(**switches)
    needs = {"config": ("mass",), "edges": ("edge_mass",), "last": ("queries", "keys")}
    shape = functools.partial(_state_shape, mass.remembers) if mass.remembers else None
    fixed_counts = mass.top_p == 1 and not per_step
    return Policy(
        name,
        needs[mass.rows],
        functools.partial(_select, mass),
        fixed_counts=fixed_counts,
        layers_at_once=fixed_counts and mass.rows != "last" and shape is None,
        state_shape=shape,
        anchor_every=anchor_every,
        per_step=per_step,
    )


def _state_shape(count, num_kv_heads, num_keys):
    return (count, num_kv_heads, num_keys)


def _select(mass, view, options):
    scores = last_row_mass(view) if mass.rows == "last" else view.mass
    if mass.scope != "config":
        options = options._replace(per_layer=mass.scope == "layer")
    scores, memory = _remember(mass, view, scores)
    if mass.smooth > 1:
        scores = _shifted_sum(scores, range(-(mass.smooth // 2), mass.smooth // 2 + 1))
    if mass.widen:
        scores = _shifted_sum(scores, range(_WIDEN_SPAN), mass.widen)
    if mass.recent_share:
        scores = force_recent(view, scores, mass.recent_share)
    needs_sum = options.per_layer and (mass.top_p < 1 or mass.max_churn < 1)
    if needs_sum:
        scores = scores.sum(1, keepdims=True)
        options = options._replace(per_layer=False)
    if mass.max_churn < 1:
        scores = _limit_churn(mass, view, scores, options)
    budgets = _smallest_budgets(mass, view, scores, options) if mass.top_p < 1 else None
    indices, counts = top_tokens(view, scores, options, budgets=budgets)
    if not mass.remembers:
        return indices, counts
    if mass.max_churn < 1:
        members = as_mask(view, indices, counts).astype(jnp.float32)
        members = jnp.broadcast_to(members, memory.shape[:1] + view.state.shape[2:])
        memory = jnp.concatenate([memory, members[:, None]], axis=1)
    return indices, counts, memory


def _remember(mass, view, scores):
    """Mix in earlier verifications: (scores, masses to remember [E, n, H, X])."""
    if mass.frozen:
        scores = jnp.where(view.is_first[:, None, None], scores, view.state[:, 0])
        return scores, scores[:, None]
    if mass.decay:
        scores = scores + mass.decay * view.state[:, 0]
        return scores, scores[:, None]
    count = mass.window - 1
    if count:
        old = view.state[:, :count]
        memory = jnp.concatenate([scores[:, None], old[:, :-1]], axis=1)
        return scores + old.sum(1), memory
    return scores, scores[:, None][:, :0]


def _shifted_sum(scores, shifts, factor=1.0):
    """Sum over `shifts` d of factor**|d| times the scores of the key d before."""
    size = scores.shape[-1]
    total = jnp.zeros_like(scores)
    for d in shifts:
        edge = ((0, 0), (0, 0), (max(d, 0), max(-d, 0)))
        moved = jnp.pad(scores, edge)[..., max(-d, 0) : max(-d, 0) + size]
        total += factor ** abs(d) * moved
    return total


def force_recent(view: SelectionView, scores: KeyScores, share: float) -> KeyScores:
    """Scores that put the newest `share` of the budget above all others."""
    count = jnp.floor(share * view.budgets.astype(jnp.float32)).astype(jnp.int32)
    position = jnp.arange(view.num_keys)
    is_recent = position[None] >= (view.lengths - count)[:, None]
    return jnp.where(is_recent[:, None], _FORCED + position, scores)


def _limit_churn(mass, view, scores, options):
    """Scores in which only the best few newcomers can still be chosen."""
    members = view.state[:, -1, : scores.shape[1]] > 0
    allowed = jnp.ceil(mass.max_churn * view.budgets.astype(jnp.float32))
    held = members.sum(-1).astype(jnp.int32)
    # Room that a grown budget leaves is no replacement.
    room = jnp.maximum(view.budgets[:, None] - held, 0)
    allowed = jnp.minimum(allowed.astype(jnp.int32)[:, None] + room, options.cap)
    newcomers = jnp.where(members, -1.0, scores)
    plain = options._replace(num_recent=0)
    indices, counts = top_tokens(view, newcomers, plain, budgets=allowed)
    admitted = as_mask(view, indices, counts)
    return jnp.where(members | admitted, scores, scores - _FORCED)


def _smallest_budgets(mass, view, scores, options):
    """Per head, the fewest tokens that hold `top_p` of the mass, int32 [E, H].

    Twilight's rule (arXiv 2502.02770) on exact masses; the budget is the ceiling.
    """
    eligible = jnp.where(candidates(view), scores, 0.0)
    width = min(options.cap, view.num_keys)
    top = jax.lax.top_k(eligible, width)[0]
    enough = jnp.cumsum(top, -1) >= mass.top_p * eligible.sum(-1, keepdims=True)
    count = jnp.where(enough.any(-1), jnp.argmax(enough, -1) + 1, width)
    return jnp.minimum(count, view.budgets[:, None]).astype(jnp.int32)


def last_row_mass(view: SelectionView) -> VerifyMass:
    """Softmax probability of every key for the last query, mean of the group.

    Reads the keys once more; the attention kernel gives mass of all or edge rows only.
    """
    lanes, _, num_heads, size = view.queries.shape
    last = jnp.maximum(view.num_queries - 1, 0)[:, None, None, None]
    query = jnp.take_along_axis(view.queries, last, axis=1)[:, 0]
    query = query.reshape(lanes, view.num_kv_heads, -1, size).astype(jnp.float32)
    keys = view.keys().astype(jnp.float32)
    logits = jnp.einsum("lhgd,lhkd->lhgk", query, keys) * size**-0.5
    visible = view.lengths + view.num_queries
    is_visible = jnp.arange(view.num_keys)[None] < visible[:, None]
    logits = jnp.where(is_visible[:, None, None], logits, -1e30)
    return jax.nn.softmax(logits, -1).mean(2)

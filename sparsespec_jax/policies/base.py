"""The interface of a drafting policy: what it sees of a verification, what it returns.

A policy is data (what it needs, what it remembers) and one pure function from a
`SelectionView` to positions. Any selection is lossless: it only moves acceptance. The
tokens verified last are always in the draft cache, whatever the policy says.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.select_tokens import select_tokens
from sparsespec_jax.array_types import (
    CandidateFlags,
    KeyFlags,
    KeyScores,
    PerVerify,
    PolicyMemory,
    Selected,
    SelectedCounts,
    VerifyFlags,
    VerifyMass,
    VerifySeeds,
    ViewQueries,
)
from sparsespec_jax.models.option_fields import MAX_INT, put_float, put_int

NEEDS = ("mass", "edge_mass", "queries", "keys")
_MASS_ALONE = (("mass",), ("edge_mass",))


class SelectionView(NamedTuple):
    """What a policy sees of one layer; E lanes, H KV heads, X key columns.

    A field that the policy did not ask for in `Policy.needs` is None.
    """

    mass: VerifyMass | None  # attention mass of every candidate
    queries: ViewQueries | None  # rotated; rows past num_queries are junk
    keys: Callable | None  # () -> [E, H, X, D], rotated; 0 at columns without a token
    num_queries: PerVerify  # valid query rows
    lengths: PerVerify  # candidates are positions [0, length)
    budgets: PerVerify  # tokens to select, <= cap
    is_first: VerifyFlags  # first selection of its request: state is all zero
    state: PolicyMemory | None  # what the policy remembers, by its state_shape
    seeds: VerifySeeds  # of the requests
    layer_index: int | None  # None: of several layers, see Policy.layers_at_once
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
    With `state_shape` it returns (indices, counts, new state).

    Attributes:
      name: what results call it.
      needs: of NEEDS. "mass" comes from the verification rows that SpeculationConfig
        names, "edge_mass" from the first and the last one; "keys" reads the K half of
        the slot's whole cache.
      select: the function above; pure, traced once per layer.
      fixed_counts: see above.
      state_shape: function (num_kv_heads, num_keys) -> shape of what a slot remembers
        per layer, float32, zero when a request starts. None: nothing.
      anchor_every: only every n-th layer selects; the others use the set of the layer
        below and compute no mass (TidalDecode, arXiv 2410.05076).
      layers_at_once: called for the lanes of several layers together, one layer behind
        the other, with view.layer_index None: fewer launches. Needs mass alone.
      index_bits: of a per_step policy, the bits per key and KV head that scoring reads
        from an index in each draft step; None: it reads K itself.
      per_step: select before every draft step for that step's query, from the whole
        cache. A ceiling of quality and never fast: plain jnp on every platform.

    Raises:
      ValueError: fields that do not fit together.
    """

    name: str
    needs: tuple[str, ...]
    select: Callable
    fixed_counts: bool = False
    state_shape: Callable | None = None
    anchor_every: int = 1
    layers_at_once: bool = False
    per_step: bool = False
    index_bits: float | None = None

    def __post_init__(self):
        needs = (self.needs,) if isinstance(self.needs, str) else tuple(self.needs)
        object.__setattr__(self, "needs", needs)
        unknown = set(needs) - set(NEEDS)
        if unknown:
            raise ValueError(f"needs must be of {NEEDS}, got {sorted(unknown)}")
        if {"mass", "edge_mass"} <= set(needs):
            raise ValueError("needs holds both 'mass' and 'edge_mass'; choose one")
        if not callable(self.select):
            raise ValueError(f"select must be a function, got {self.select!r}")
        put_int(self, "anchor_every", 1)
        if self.index_bits is not None:
            put_float(self, "index_bits", 0, MAX_INT)
        if self.layers_at_once and (
            self.state_shape or not self.fixed_counts or self.needs not in _MASS_ALONE
        ):
            raise ValueError(
                "with layers_at_once a policy needs mass alone, remembers nothing and "
                "has fixed_counts"
            )
        if self.index_bits is not None and not self.per_step:
            raise ValueError("index_bits goes with per_step")
        if self.per_step and (
            self.state_shape or self.anchor_every > 1 or self.fixed_counts
        ):
            raise ValueError(
                "a per_step policy remembers nothing, selects in every layer and "
                "copies nothing: drop state_shape, anchor_every and fixed_counts"
            )

    @property
    def kind(self) -> str:
        """When it selects: "together" for several layers, by "layer", by draft "step".

        Each kind has its own way to fill the draft caches (device/filling.py).
        """
        if self.per_step:
            return "step"
        return "together" if self.layers_at_once else "layer"

    @property
    def needs_mass(self) -> bool:
        """True if verification must produce attention mass for it."""
        return "mass" in self.needs or "edge_mass" in self.needs

    def mass_rows(self, default: str) -> str:
        """The verification rows that its mass comes from."""
        return "edges" if "edge_mass" in self.needs else default

    def is_anchor(self, layer_index: int) -> bool:
        """True if the layer selects for itself."""
        return layer_index % self.anchor_every == 0


def run_policy(
    policy: Policy, view: SelectionView, options: SelectionOptions
) -> tuple[Selected, SelectedCounts, PolicyMemory | None]:
    """(indices, counts, new state or None) of one call of the policy's function."""
    result = policy.select(view, options)
    expected = 3 if policy.state_shape else 2
    if len(result) != expected:
        raise ValueError(
            f"policy {policy.name!r} returned {len(result)} values, expected {expected}"
            " (indices, counts" + (", state)" if policy.state_shape else ")")
        )
    return (*result, None)[:3]


def top_tokens(
    view: SelectionView,
    scores: KeyScores,
    options: SelectionOptions,
    *,
    budgets: PerVerify | SelectedCounts | None = None,
) -> tuple[Selected, SelectedCounts]:
    """The candidates of largest scores, as a policy returns them.

    `budgets` may be one per head; None means the view's. Scores must be finite below
    `view.lengths`; `options` adds recents and the scope of the selection.
    """
    budgets = view.budgets if budgets is None else budgets
    if budgets.ndim == 2:
        return _top_tokens_by_head(view, scores, options, budgets)
    indices, counts = select_tokens(
        scores,
        view.lengths,
        budgets,
        cap=options.cap,
        num_recent=options.num_recent,
        per_layer=options.per_layer,
        impl=options.impl,
    )
    return (indices[:, :1], counts[:, :1]) if options.per_layer else (indices, counts)


def _top_tokens_by_head(view, scores, options, budgets):
    lanes, heads, num_keys = scores.shape
    indices, counts = select_tokens(
        scores.reshape(-1, 1, num_keys),
        jnp.repeat(view.lengths, heads),
        budgets.reshape(-1),
        cap=options.cap,
        num_recent=options.num_recent,
        impl=options.impl,
    )
    return indices.reshape(lanes, heads, -1), counts.reshape(lanes, heads)


def candidates(view: SelectionView) -> CandidateFlags:
    """The positions that may be selected."""
    return jnp.arange(view.num_keys)[None, None] < view.lengths[:, None, None]


def as_mask(view: SelectionView, indices: Selected, counts: SelectedCounts) -> KeyFlags:
    """The positions of a selection."""
    place = jnp.arange(indices.shape[-1])
    columns = jnp.where(place < counts[..., None], indices, view.num_keys)
    lane = jnp.arange(indices.shape[0])[:, None, None]
    head = jnp.arange(indices.shape[1])[None, :, None]
    empty = jnp.zeros((*indices.shape[:2], view.num_keys), bool)
    return empty.at[lane, head, columns].set(True, mode="drop")

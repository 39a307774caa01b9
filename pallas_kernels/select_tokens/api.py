"""Public entry of token selection: argument checks, choice of implementation."""

from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.array_types import PerHead, PerLane, Positions, Scores
from pallas_kernels.common import check_dtype, check_shape, load_implementation


class SelectedTokens(NamedTuple):
    """Result of `select_tokens`."""

    indices: Positions  # ascending; anything past the count
    counts: PerHead


def select_tokens(
    scores: Scores,
    lengths: PerLane,
    budgets: PerLane,
    *,
    cap: int,
    num_recent: int = 0,
    per_layer: bool = False,
    impl: str | None = None,
) -> SelectedTokens:
    """Returns the positions of the best candidates of every (lane, KV head).

    `count = min(budget, length)` positions out of `[0, length)` are chosen: first
    the `min(num_recent, count)` highest positions, then the largest scores among
    the others, equal scores by lowest position (0.0 and -0.0 are equal). The result
    is exact and ascending. Indices past a count mean nothing.

    Args:
      scores: float32 [lanes, H, X], larger is better; NaN and infinities only at
        or past the length of the lane.
      lengths: int32 [lanes], number of candidates, 0..X.
      budgets: int32 [lanes], number wanted, 0..cap.
      cap: static size of the index lists.
      num_recent: number of last candidates that are always chosen.
      per_layer: score a position by the sum over the heads (added in head order,
        in float32) and give every head the same list.
      impl: one of `pallas_kernels.IMPLS`; None means `default_impl()`.

    Raises:
      ValueError: shapes, dtypes or options that do not fit together.
      NotImplementedError: the chosen implementation cannot serve the shapes.
    """
    check_shape("scores", scores, (None, None, None), "[lanes, H, X]")
    lanes = scores.shape[0]
    if 0 in scores.shape:
        raise ValueError(f"scores has shape {scores.shape}: no axis may be empty")
    check_shape("lengths", lengths, (lanes,), "[lanes]")
    check_shape("budgets", budgets, (lanes,), "[lanes]")
    check_dtype("scores", scores, jnp.float32)
    check_dtype("lengths", lengths, jnp.int32)
    check_dtype("budgets", budgets, jnp.int32)
    if cap < 1:
        raise ValueError(f"cap is {cap}, expected at least 1 index per list")
    if num_recent < 0:
        raise ValueError(f"num_recent is {num_recent}, expected 0 or more")
    function = load_implementation(
        "pallas_kernels.select_tokens", "select_tokens", impl
    )
    return function(
        scores,
        lengths,
        budgets,
        cap=int(cap),
        num_recent=int(num_recent),
        per_layer=bool(per_layer),
    )

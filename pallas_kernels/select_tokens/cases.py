"""Named shapes of token selection, frozen (see `pallas_kernels.cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, SMALL, TIMED, Case, int32


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectCase(Case):
    """One call of `select_tokens`."""

    num_candidates: int  # columns of the scores
    cap: int
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    num_heads: int = 8
    num_recent: int = 0
    per_layer: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return dict(cap=self.cap, num_recent=self.num_recent, per_layer=self.per_layer)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        lanes = len(self.lengths)
        shape = (lanes, self.num_heads, self.num_candidates)
        scores = jax.ShapeDtypeStruct(shape, jnp.float32)
        return scores, int32(lanes), int32(lanes)


def _case(name, candidates_cap, lengths, budgets, **sizes):
    num_candidates, cap = candidates_cap
    return SelectCase(
        name=name,
        num_candidates=num_candidates,
        cap=cap,
        lengths=lengths,
        budgets=budgets,
        **sizes,
    )


def _full(name, num_candidates, cap, num_lanes=14, **sizes):
    """All lanes have as many candidates, and choose as many, as there is room for."""
    lengths, budgets = (num_candidates,) * num_lanes, (cap,) * num_lanes
    return _case(name, (num_candidates, cap), lengths, budgets, **sizes)


_TWO = dict(num_heads=2, tags=SMALL)

SELECT_CASES = (
    _case("few", (16, 8), (16, 5, 0, 9), (8, 8, 8, 0), **_TWO),
    _case(
        "recent",
        (300, 40),
        (300, 129, 20, 256),
        (40, 7, 40, 1),
        num_heads=3,
        num_recent=9,
        tags=SMALL,
    ),
    _case(
        "layer",
        (256, 64),
        (256, 255, 128),
        (64, 33, 64),
        num_heads=4,
        num_recent=4,
        per_layer=True,
        tags=SMALL,
    ),
    # More wanted than there is: everything is chosen.
    _case("all_of_it", (128, 160), (128, 31), (160, 160), **_TWO),
    _case("select_2k", (2048, 192), (2048, 1999), (192, 100), num_recent=16, **_TWO),
    _full("select_8k", 8192, 410),
    _full("select_8k_layer", 8192, 410, per_layer=True),
    _full("select_32k", 32768, 1638),
    # Wider than the registers; texts that need no more than these, and some that do.
    _case("select_40k", (40960, 2048), (8192,) * 14, (410,) * 14, tags=H100),
    _full("select_40k_full", 40960, 2048, tags=TIMED),
    _full("select_131k", 131072, 6554, num_lanes=2, num_recent=64),
)

"""Named shapes of token selection, frozen as those of `cases`."""

import dataclasses

from pallas_kernels.cases import H100, LARGE, SMALL


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectCase:
    """One call of `select_tokens`."""

    name: str
    num_candidates: int  # columns of the scores
    cap: int
    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    num_heads: int = 8
    num_recent: int = 0
    per_layer: bool = False
    tags: frozenset[str] = LARGE


SELECT_CASES = (
    SelectCase(
        name="few",
        num_candidates=16,
        cap=8,
        lengths=(16, 5, 0, 9),
        budgets=(8, 8, 8, 0),
        num_heads=2,
        tags=SMALL,
    ),
    SelectCase(
        name="recent",
        num_candidates=300,
        cap=40,
        lengths=(300, 129, 20, 256),
        budgets=(40, 7, 40, 1),
        num_heads=3,
        num_recent=9,
        tags=SMALL,
    ),
    SelectCase(
        name="layer",
        num_candidates=256,
        cap=64,
        lengths=(256, 255, 128),
        budgets=(64, 33, 64),
        num_heads=4,
        num_recent=4,
        per_layer=True,
        tags=SMALL,
    ),
    # More wanted than there is: everything is chosen.
    SelectCase(
        name="all_of_it",
        num_candidates=128,
        cap=160,
        lengths=(128, 31),
        budgets=(160, 160),
        num_heads=2,
        tags=SMALL,
    ),
    SelectCase(
        name="select_2k",
        num_candidates=2048,
        cap=192,
        lengths=(2048, 1999),
        budgets=(192, 100),
        num_heads=2,
        num_recent=16,
        tags=SMALL,
    ),
    SelectCase(
        name="select_8k",
        num_candidates=8192,
        cap=410,
        lengths=(8192,) * 14,
        budgets=(410,) * 14,
    ),
    SelectCase(
        name="select_8k_layer",
        num_candidates=8192,
        cap=410,
        lengths=(8192,) * 14,
        budgets=(410,) * 14,
        per_layer=True,
    ),
    SelectCase(
        name="select_32k",
        num_candidates=32768,
        cap=1638,
        lengths=(32768,) * 14,
        budgets=(1638,) * 14,
    ),
    # Wider than the registers; texts that need no more than these, and some that do.
    SelectCase(
        name="select_40k",
        num_candidates=40960,
        cap=2048,
        lengths=(8192,) * 14,
        budgets=(410,) * 14,
        tags=H100,
    ),
    SelectCase(
        name="select_40k_full",
        num_candidates=40960,
        cap=2048,
        lengths=(40960,) * 14,
        budgets=(2048,) * 14,
        tags=H100,
    ),
    SelectCase(
        name="select_131k",
        num_candidates=131072,
        cap=6554,
        lengths=(131072,) * 2,
        budgets=(6554,) * 2,
        num_recent=64,
    ),
)

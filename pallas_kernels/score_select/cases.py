"""Named shapes of scoring and selecting, frozen (see `pallas_kernels.cases`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cases import H100, SMALL, TIMED, Case, int32
from pallas_kernels.score_select.codes import CodeLayout, code_layout

LARGEST_GROUP = {4: 128, 2: 64}  # most keys that are rounded together, by bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexCase(Case):
    """One call over the codes of keys in pages."""

    width: int  # columns of the table
    bits: int = 4
    num_heads: int = 8
    head_size: int = 128
    page_size: int = 64
    dtype: str = "bfloat16"

    @property
    def layout(self) -> CodeLayout:
        """Of the codes."""
        return code_layout(
            self.page_size, self.head_size, self.bits, LARGEST_GROUP[self.bits]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoreCase(IndexCase):
    """One call of `score_select`."""

    lengths: tuple[int, ...]
    budgets: tuple[int, ...]
    cap: int
    group_size: int = 4
    num_recent: int = 0

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the call."""
        return dict(layout=self.layout, cap=self.cap, num_recent=self.num_recent)

    @property
    def num_pages(self) -> int:
        """Pages that hold keys, and one more."""
        return 1 + sum(-(-length // self.page_size) for length in self.lengths)

    @property
    def shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Arrays of the call."""
        lanes = len(self.lengths)
        q = (lanes, self.num_heads * self.group_size, self.head_size)
        codes = int32(*self.layout.shape(self.num_pages, self.num_heads))
        table = int32(lanes, self.width)
        q = jax.ShapeDtypeStruct(q, jnp.dtype(self.dtype))
        return q, codes, table, int32(lanes), int32(lanes)


def _case(name, lengths, budgets, **sizes):
    return ScoreCase(name=name, lengths=lengths, budgets=budgets, **sizes)


def _load(name, lanes, length, share, **sizes):
    """Lanes of nearly one length, as the draft lanes of a step have them."""
    lengths = tuple(length - 37 * (i % 8) for i in range(lanes))
    budgets = tuple(-(-n * share // 100) for n in lengths)
    width = sizes.pop("width", -(-length // 2048) * 32)
    return _case(
        name, lengths, budgets, cap=max(budgets), width=width, tags=H100, **sizes
    )


_FEW = dict(num_heads=2, tags=SMALL)

SCORE_CASES = (
    _case("score_small", (300, 64, 0, 1), (40, 40, 9, 3), cap=40, width=8, **_FEW),
    _case(
        "score_pages_16",
        (275, 16),
        (30, 30),
        cap=32,
        width=20,
        page_size=16,
        group_size=3,
        head_size=64,
        num_recent=5,
        **_FEW,
    ),
    _case(
        "score_g7",
        (530,),
        (100,),
        cap=128,
        width=5,
        page_size=128,
        group_size=7,
        head_size=64,
        **_FEW,
    ),
    _case(
        "score_2_bits",
        (700, 65),
        (64, 64),
        cap=64,
        width=12,
        bits=2,
        group_size=8,
        **_FEW,
    ),
    _case(
        "score_2_bits_pages_8",
        (100,),
        (20,),
        cap=24,
        width=14,
        bits=2,
        group_size=1,
        page_size=8,
        **_FEW,
    ),
    # Draft lanes of Qwen3-8B: 64 slots of 2.5K and 48 of 15K positions, k = 8, 5 %.
    _load("score_456_2k", 57, 2500, 5),
    _load("score_344_15k", 43, 15000, 5),
    _load("score_456_2k_2_bits", 57, 2500, 5, bits=2),
    _load("score_344_15k_2_bits", 43, 15000, 5, bits=2),
    _load("score_344_15k_page_128", 43, 15000, 5, page_size=128, width=128),
    # Qwen2.5-1.5B, 128 slots of 8K.
    _load("score_1_5b_8k", 114, 8192, 5, num_heads=2, group_size=6),
    dataclasses.replace(
        _load("score_456_2k_page_16", 57, 2500, 5, page_size=16, width=192), tags=TIMED
    ),
)
